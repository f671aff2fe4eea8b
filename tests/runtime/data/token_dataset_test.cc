#include <chrono>
#include <numeric>
#include <type_traits>

#include <unistd.h>

#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/data/token_dataset.h>
#include <lockstep/data/token_format.h>

#include "data_folder.h"

namespace lockstep::data {
namespace {

constexpr TokenDatasetOptions kTokenOptions{.sequence_length = 7, .vocab_size = 100};

std::vector<int64_t> some_tokens(int64_t n) {
  std::vector<int64_t> tokens(n);
  for (int64_t i = 0; i < n; ++i) tokens[i] = (i * i + 3 * i) % 100;
  return tokens;
}

template <typename T>
std::string llmc(const std::vector<int64_t>& tokens, int32_t magic, int32_t version) {
  std::string bytes = packed<int32_t>(std::vector<int64_t>{magic, version, static_cast<int64_t>(tokens.size())});
  bytes.resize(kTokenHeaderBytes);
  return bytes + packed<T>(tokens);
}

// One sequence of 3 tokens, then one of the rest, two documents.
std::string megatron_index(int64_t tokens, int code, int64_t width) {
  const std::vector<int64_t> lengths{3, tokens - 3}, offsets{0, 3 * width}, documents{0, 1, 2};
  return std::string("MMIDIDX\0\0", 9) + packed<uint64_t>(std::vector<int64_t>{1}) + static_cast<char>(code) +
         packed<uint64_t>(std::vector<int64_t>{2, 3}) + packed<int32_t>(lengths) + packed<int64_t>(offsets) +
         packed<int64_t>(documents);
}

// Every sample against the twenty-line reference: tokens [i T, i T + T), targets one later.
void expect_stream(const std::string& files, const std::vector<int64_t>& stream) {
  const auto dataset = open_token_dataset(files, kTokenOptions);
  const int64_t length = kTokenOptions.sequence_length;
  ASSERT_EQ(dataset->size(), (static_cast<int64_t>(stream.size()) - 1) / length);
  std::vector<int64_t> indices(dataset->size());
  std::iota(indices.rbegin(), indices.rend(), 0);  // backwards: no reader may rely on order
  const Batch batch = dataset->get(indices);
  ASSERT_EQ(batch.tensors[0].sizes(), (std::vector<int64_t>{dataset->size(), length}));
  for (size_t row = 0; row < indices.size(); ++row) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = static_cast<int64_t>(row) * length + i;
      ASSERT_EQ(batch.tensors[0].const_data_ptr<int64_t>()[at], stream[indices[row] * length + i]) << files;
      ASSERT_EQ(batch.tensors[1].const_data_ptr<int64_t>()[at], stream[indices[row] * length + i + 1]) << files;
    }
  }
}

TEST(TokenDatasetTest, ReadsEveryFormatAlike) {
  const DataFolder folder;
  for (const int64_t n : {8, 14, 15, 1000}) {  // one sample exactly; one token short of two; two; many
    const auto tokens = some_tokens(n);
    expect_stream(folder.write("raw", packed<uint16_t>(tokens)), tokens);
    expect_stream(folder.write("u16.bin", llmc<uint16_t>(tokens, kTokenMagicU16, 1)), tokens);
    expect_stream(folder.write("u32.bin", llmc<uint32_t>(tokens, kTokenMagicU32, 7)), tokens);
    const auto megatron = [&](int code, int width, const std::string& bytes) {
      folder.write("m.idx", megatron_index(n, code, width));
      expect_stream(folder.write("m.bin", bytes), tokens);
      std::filesystem::remove(folder.path("m.idx"));
    };
    megatron(1, 1, packed<uint8_t>(tokens));
    megatron(2, 1, packed<int8_t>(tokens));
    megatron(3, 2, packed<int16_t>(tokens));
    megatron(4, 4, packed<int32_t>(tokens));
    megatron(5, 8, packed<int64_t>(tokens));
    megatron(8, 2, packed<uint16_t>(tokens));
  }
}

TEST(TokenDatasetTest, ShardsOfAGlobAreOneStreamInSortedOrder) {
  const DataFolder folder;
  const auto tokens = some_tokens(500);
  const auto part = [&](int64_t from, int64_t to) {
    return std::vector<int64_t>(tokens.begin() + from, tokens.begin() + to);
  };
  folder.write("shard_000002.bin", llmc<uint32_t>(part(203, 500), kTokenMagicU32, 7));
  folder.write("shard_000000.bin", llmc<uint16_t>(part(0, 200), kTokenMagicU16, 1));
  folder.write("shard_000001.bin", packed<uint16_t>(part(200, 203)));  // a whole shard inside one sample
  expect_stream(folder.path("shard_*.bin"), tokens);
}

TEST(TokenDatasetTest, LinksToFilesAreFollowed) {
  const DataFolder folder;
  const auto tokens = some_tokens(50);
  std::filesystem::create_symlink(folder.write("there", packed<uint16_t>(tokens)), folder.path("link.bin"));
  expect_stream(folder.path("link.bin"), tokens);
}

TEST(TokenDatasetTest, AnIdOutsideTheVocabularyIsNamedWithFileAndPosition) {
  const DataFolder folder;
  auto tokens = some_tokens(500);
  tokens[123] = 100;
  const auto path = folder.write("bad.bin", packed<uint16_t>(tokens));
  const auto dataset = open_token_dataset(path, kTokenOptions);
  const std::vector<int64_t> good{0, 1}, bad{0, 123 / 7};
  EXPECT_NO_THROW(dataset->get(good));
  const auto message = message_of<CorruptData>([&] { dataset->get(bad); });
  EXPECT_NE(message.find("'" + path + "': token 123 has id 100, outside a vocabulary of 100"), std::string::npos)
      << message;
  folder.write("m.idx", megatron_index(500, 3, 2));
  tokens[123] = -1;
  const auto negative = open_token_dataset(folder.write("m.bin", packed<int16_t>(tokens)), kTokenOptions);
  EXPECT_NE(message_of<CorruptData>([&] { negative->get(bad); }).find("has id -1"), std::string::npos);
}

TEST(TokenDatasetTest, WhatAPersonCanMendIsAConfigError) {
  const DataFolder folder;
  const auto message = [&](const std::string& files) {
    return message_of<ConfigError>([&] { open_token_dataset(files, kTokenOptions); });
  };
  for (const auto& text :
       {message(""), message(folder.path("absent.bin")), message(folder.path("*.none")), message(folder.path("")),
        message(folder.write("empty.bin", "")), message(folder.write("short.bin", packed<uint16_t>(some_tokens(7))))}) {
    EXPECT_NE(text.find("Mend: "), std::string::npos) << text;
  }
  const auto secret = folder.write("secret.bin", packed<uint16_t>(some_tokens(50)));
  std::filesystem::permissions(secret, std::filesystem::perms::none);
  if (::geteuid() != 0) {  // root reads everything
    EXPECT_NE(message(secret).find("permissions"), std::string::npos);
  }
}

TEST(TokenDatasetTest, DamagedFilesAreCorruptData) {
  const DataFolder folder;
  const auto message = [&](const std::string& bytes) {
    return message_of<CorruptData>([&] { open_token_dataset(folder.write("x.bin", bytes), kTokenOptions); });
  };
  const auto whole = llmc<uint16_t>(some_tokens(500), kTokenMagicU16, 1);
  EXPECT_NE(message(whole.substr(0, whole.size() - 2)).find("cut short"), std::string::npos);
  EXPECT_NE(message(whole + "xx").find("cut short"), std::string::npos);
  EXPECT_NE(message(llmc<uint16_t>(some_tokens(500), kTokenMagicU16, 2)).find("unknown version 2"), std::string::npos);
  EXPECT_NE(message(packed<uint16_t>(some_tokens(50)) + "x").find("odd size"), std::string::npos);

  const auto index = megatron_index(500, 8, 2), tokens = packed<uint16_t>(some_tokens(500));
  const auto with_index = [&](const std::string& idx, const std::string& bin) {
    folder.write("x.idx", idx);
    return message(bin);
  };
  EXPECT_NE(with_index(index, tokens.substr(2)).find("describes 500 tokens"), std::string::npos);
  EXPECT_NE(with_index("MMIDIDXX" + index.substr(8), tokens).find("no Megatron index"), std::string::npos);
  auto floats = index;
  floats[17] = 6;
  EXPECT_NE(with_index(floats, tokens).find("dtype code 6"), std::string::npos);
  auto negative = index;
  negative[37] = '\xff';  // the sign of the first length
  EXPECT_NE(with_index(negative, tokens).find("sequence of -"), std::string::npos);
  for (const size_t length : {size_t{0}, size_t{5}, size_t{20}, size_t{33}, index.size() - 1})
    EXPECT_NE(with_index(index.substr(0, length), tokens), "");
}

TEST(TokenDatasetTest, AFileCutWhileItIsReadIsAnErrorAndNoCrash) {
  const DataFolder folder;
  const auto path = folder.write("x.bin", packed<uint16_t>(some_tokens(500)));
  const auto dataset = open_token_dataset(path, kTokenOptions);
  std::filesystem::resize_file(path, 100);
  const std::vector<int64_t> gone{60};
  EXPECT_THROW(dataset->get(gone), CorruptData);
}

TEST(TokenDatasetTest, TheFingerprintTellsOtherDataButNotAnotherFolder) {
  const DataFolder folder, other;
  const auto bytes = packed<uint16_t>(some_tokens(5000));
  const auto print = [](const std::string& path) { return open_token_dataset(path, kTokenOptions)->fingerprint(); };
  const auto original = print(folder.write("x.bin", bytes));
  EXPECT_EQ(print(other.write("x.bin", bytes)), original);
  EXPECT_NE(print(folder.write("y.bin", bytes)), original);
  EXPECT_NE(print(folder.write("x.bin", bytes.substr(2))), original);
  auto changed = bytes;
  changed[10] ^= 1;
  EXPECT_NE(print(folder.write("x.bin", changed)), original);
}

// Not a benchmark: a floor far below what it does (hundreds of millions a second), to notice a slow path at once.
TEST(TokenDatasetTest, ReadsManyMillionTokensASecond) {
  const DataFolder folder;
  const auto path = folder.write("x.bin", packed<uint16_t>(some_tokens(4'000'001)));
  const auto dataset = open_token_dataset(path, {.sequence_length = 1024, .vocab_size = 100});
  std::vector<int64_t> indices(12);
  int64_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t step = 0; step < 2000; ++step) {
    for (int64_t i = 0; i < 12; ++i) indices[i] = (step * 12 + i) * 577 % dataset->size();
    tokens += dataset->get(indices).tensors[0].numel();
  }
  const double rate =
      static_cast<double>(tokens) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::cout << "tokens/s: " << rate << "\n";
#ifdef LOCKSTEP_SANITIZED
  constexpr double kFloor = 1e6;
#else
  constexpr double kFloor = 2e7;
#endif
  EXPECT_GT(rate, kFloor);
}

}  // namespace
}  // namespace lockstep::data
