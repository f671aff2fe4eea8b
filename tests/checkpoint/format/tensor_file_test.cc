#include <cstring>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/tensor_file.h>

#include "complaint.h"

namespace lockstep::format {
namespace {

using testing::HasSubstr;

std::string head_of(const std::string& json) {
  const uint64_t length = json.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + json;
}

TensorHeader parse(const std::string& json, uint64_t data_bytes) {
  const std::string head = head_of(json);
  return parse_header(head, head.size() + data_bytes, "x.safetensors");
}

std::string header_complaint(const std::string& json, uint64_t data_bytes) {
  return complaint_of([&] { parse(json, data_bytes); });
}

TEST(ChecksumTest, Crc32cHasItsCheckValue) {
  EXPECT_EQ(hex8(crc32c("123456789")), "e3069283");
  EXPECT_EQ(hex8(crc32c("")), "00000000");
}

TEST(ChecksumTest, Sha256HasTheValuesOfItsStandard) {  // FIPS 180-2, appendix B
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  Sha256 parts;
  for (const char* part : {"abcdbcdecdefdefgefghfghighij", "", "hijkijkljklmklmnlmnomnopnopq"})
    parts.add(std::as_bytes(std::span(part, std::strlen(part))));
  EXPECT_EQ(parts.hex(), "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

TEST(ChecksumTest, ADigestIsTheSameInOnePieceAndInMany) {
  std::string text(100'001, '\0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 31);
  Digester digester;
  for (size_t begin = 0; begin < text.size(); begin += 777)
    digester.add(std::as_bytes(std::span(text).subspan(begin, std::min<size_t>(777, text.size() - begin))));
  EXPECT_EQ(digester.hex(), digest(text));
  EXPECT_EQ(digest(""), "99aa06d3014798d86001c324468d497f");  // XXH3-128 of nothing, from the reference test vectors
}

TEST(TensorFileTest, AHeaderComesBackAsItWasAndDataStartsAligned) {
  std::vector<TensorEntry> tensors = {
      {.name = "a \"quoted\" näme", .dtype = "F32", .shape = {2, 3}, .begin = 0, .end = 0},
      {.name = "empty", .dtype = "BF16", .shape = {0, 7}, .begin = 0, .end = 0},
      {.name = "scalar", .dtype = "I64", .shape = {}, .begin = 0, .end = 0}};
  const std::string head = encode_header(tensors, {{"format", "pt"}});
  EXPECT_EQ(head.size() % 64, 0U);
  const TensorHeader header = parse_header(head, head.size() + 32, "x");
  EXPECT_EQ(header.data_start, head.size());
  EXPECT_EQ(header.metadata.at("format"), "pt");
  ASSERT_EQ(header.tensors.size(), 3U);
  for (const TensorEntry& entry : header.tensors) {
    const auto same = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == entry.name; });
    ASSERT_NE(same, tensors.end());
    EXPECT_EQ(entry.shape, same->shape);
    EXPECT_EQ(entry.dtype, same->dtype);
    EXPECT_EQ(entry.begin, same->begin);
    EXPECT_EQ(entry.end, same->end);
  }
}

TEST(TensorFileTest, AnUnpaddedHeaderOfAnotherWriterIsRead) {
  const TensorHeader header = parse(R"({"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", 3);
  EXPECT_EQ(header.tensors.at(0).name, "w");
}

TEST(TensorFileTest, EveryHostileHeaderIsRefusedByName) {
  const auto entry = [](const std::string& members) { return "{\"w\":{" + members + "}}"; };
  const std::string name_of_1025(1025, 'n');
  std::string deep;
  for (int i = 0; i < 40; ++i) deep += "{\"k\":";
  const struct {
    std::string json;
    uint64_t data_bytes;
    std::string said;
  } cases[] = {
      {"", 0, "not valid JSON"},
      {"[]", 0, "no object"},
      {"{\"w\":3}", 0, "no object"},
      {"{\"w\":{}}", 0, "lacks 'dtype'"},
      {entry(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"), 4, "unknown dtype 'F31'"},
      {entry(R"("dtype":4,"shape":[1],"data_offsets":[0,4])"), 4, "no text"},
      {entry(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), 4, "not made of counts"},
      {entry(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), 4, "not made of counts"},
      {entry(R"("dtype":"F32","shape":[1e300],"data_offsets":[0,4])"), 4, "not made of counts"},
      {entry(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4])"), 4, "not made of counts"},
      {entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4])"), 4, "impossible shape"},
      {entry(R"("dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,0])"), 0, "its shape and dtype"},
      {entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"), 1, "more than 16"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), 4, "bad data_offsets"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), 4, "bad data_offsets"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])"), 8, "its shape and dtype"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), 8, "starts at byte 4 where 0 is next"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), 5, "its header describes"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), 3, "its header describes"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "starts at byte 1 where 2 is next"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2, "the key 'a' twice"},
      {R"({"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, "no lawful name"},
      {"{\"" + name_of_1025 + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, "no lawful name"},
      {R"({"a\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, "control characters"},
      {"{\"\xff\":{}}", 0, "not valid JSON"},
      {R"({"__metadata__":{"k":1}})", 0, "'__metadata__/k' is no text"},
      {R"({"__metadata__":[]})", 0, "'__metadata__' is no object"},
      {"{\"w\":{\"x\":" + deep, 0, "deeper than 32"},
  };
  for (const auto& c : cases) {
    EXPECT_THAT(header_complaint(c.json, c.data_bytes), HasSubstr(c.said)) << c.json.substr(0, 200);
    EXPECT_THAT(header_complaint(c.json, c.data_bytes), HasSubstr("x.safetensors")) << c.json.substr(0, 200);
  }
}

TEST(TensorFileTest, ALengthFieldThatLiesIsRefused) {
  std::string head = head_of("{}");
  for (const uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, UINT64_MAX, uint64_t{INT64_MAX}}) {
    std::memcpy(head.data(), &length, sizeof(length));
    EXPECT_THROW(parse_header(head, head.size(), "x"), CorruptData) << length;
  }
  EXPECT_THROW(parse_header("short", 5, "x"), CorruptData);
}

TEST(TensorFileTest, TwentyThousandMutatedHeadersNeverDoWorseThanCorruptData) {
  std::vector<TensorEntry> tensors = {{.name = "a", .dtype = "F32", .shape = {2, 3}, .begin = 0, .end = 0},
                                      {.name = "b", .dtype = "U8", .shape = {5}, .begin = 0, .end = 0}};
  const std::string head = encode_header(tensors, {{"format", "pt"}, {"DCP_VERSION", "1.0"}});
  const std::string alphabet = "{}[]\",:0123456789-.eE\\ut\x01\x80 \xff";
  std::mt19937 random(5);
  int refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string mutant = head;
    for (size_t change = 0; change <= random() % 3; ++change) {
      const size_t at = 8 + random() % (mutant.size() - 8);
      switch (random() % 3) {
        case 0:
          mutant[at] = alphabet[random() % alphabet.size()];
          break;
        case 1:
          mutant.erase(at, 1 + random() % 5);
          break;
        default:
          mutant.insert(at, mutant.substr(8 + random() % (mutant.size() - 8), 1 + random() % 20));
      }
    }
    const uint64_t length = mutant.size() - 8;
    std::memcpy(mutant.data(), &length, sizeof(length));
    try {
      parse_header(mutant, mutant.size() + 29, "x");
    } catch (const CorruptData&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 10'000);
}

}  // namespace
}  // namespace lockstep::format
