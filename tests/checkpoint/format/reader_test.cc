#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>
#include <lockstep/format/writer.h>

#include "../temp_dir.h"
#include "complaint.h"
#include "written_checkpoint.h"

namespace lockstep::format {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<Box> rows(const std::vector<int64_t>& shape, int parts, size_t dim) {
  std::vector<Box> boxes;
  for (int part = 0; part < parts; ++part) {
    Box box = Box::whole(shape);
    box.offsets[dim] = shape[dim] * part / parts;
    box.sizes[dim] = shape[dim] * (part + 1) / parts - box.offsets[dim];
    boxes.push_back(box);
  }
  return boxes;
}

std::vector<std::byte> expected(const WrittenTensor& tensor, const Box& box) {
  std::vector<std::byte> bytes(static_cast<size_t>(box.numel() * item_bytes(tensor.dtype)));
  cut(tensor, box, bytes);
  return bytes;
}

TEST(ReaderTest, AnyStoredCutIsReadIntoAnyWantedCut) {
  const std::vector<int64_t> shape = {7, 5, 6};
  const std::vector<std::vector<Box>> cuts = {
      {Box::whole(shape)}, rows(shape, 2, 0), rows(shape, 3, 1), rows(shape, 4, 2), rows(shape, 8, 0)};
  for (const auto& stored : cuts) {
    const TempDir directory;
    const WrittenTensor tensor{"w", "F32", shape, stored};
    write_checkpoint(directory.path(), {tensor});
    const Reader reader(real_fs(), directory.path());
    for (const auto& wanted_boxes : cuts) {
      for (const Box& wanted : wanted_boxes) {
        std::vector<std::byte> bytes(static_cast<size_t>(wanted.numel() * 4));
        reader.read("w", wanted, bytes);
        EXPECT_EQ(bytes, expected(tensor, wanted)) << stored.size() << " boxes";
      }
    }
  }
}

TEST(ReaderTest, TensorsOfManyChunksReadWholeAndInParts) {
  const std::vector<int64_t> shape = {2100, 1000};  // 8.4 MB: two chunks and a part
  for (const auto& stored : {std::vector<Box>{Box::whole(shape)}, rows(shape, 3, 0), rows(shape, 2, 1)}) {
    const TempDir directory;
    const WrittenTensor tensor{"w", "F32", shape, stored};
    write_checkpoint(directory.path(), {tensor});
    const Reader reader(real_fs(), directory.path());
    for (const Box& wanted :
         {Box::whole(shape), Box{{1040, 0}, {20, 1000}}, Box{{0, 990}, {2100, 10}}, Box{{2099, 999}, {1, 1}}}) {
      std::vector<std::byte> bytes(static_cast<size_t>(wanted.numel() * 4));
      reader.read("w", wanted, bytes);
      EXPECT_TRUE(bytes == expected(tensor, wanted)) << stored.size() << " boxes, wanted at " << wanted.offsets[0];
    }
  }
}

TEST(ReaderTest, OnlyTheChunksABoxNeedsAreRead) {
  const std::vector<int64_t> shape = {4 << 20, 4};  // 16 chunks
  const TempDir directory;
  write_checkpoint(directory.path(), {{"w", "F32", shape, {Box::whole(shape)}}});
  FaultFs watched(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
  const Reader reader(watched, directory.path());
  const size_t before = watched.log().size();
  const Box wanted{{1 << 20, 0}, {10, 4}};
  std::vector<std::byte> bytes(160);
  reader.read("w", wanted, bytes);
  uint64_t bytes_read = 0;
  const auto log = watched.log();
  for (size_t i = before; i < log.size(); ++i) bytes_read += std::stoull(log[i].substr(log[i].rfind(' ') + 1));
  EXPECT_EQ(bytes_read, kChunkBytes);
}

TEST(ReaderTest, DigestsDoNotDependOnTheLayoutButOnEverythingElse) {
  const std::vector<int64_t> shape = {6, 10};
  CheckpointDigests first;
  for (const auto& stored : {std::vector<Box>{Box::whole(shape)}, rows(shape, 3, 0), rows(shape, 4, 1)}) {
    const TempDir directory;
    write_checkpoint(directory.path(), {{"w", "F32", shape, stored}, {"exp_avg:w", "F32", shape, stored}});
    const Reader reader(real_fs(), directory.path());
    const CheckpointDigests digests = compute_digests(reader);
    if (first.weights.empty()) first = digests;
    EXPECT_EQ(digests.tensors, first.tensors);
    EXPECT_EQ(digests.weights, first.weights);
    EXPECT_EQ(digests.optimizer, first.optimizer);
    EXPECT_EQ(compute_digests(reader, {}, 1).weights, first.weights);
  }
  EXPECT_NE(first.weights, first.optimizer);
  for (const WrittenTensor& other :
       {WrittenTensor{"v", "F32", shape, {Box::whole(shape)}}, WrittenTensor{"w", "I32", shape, {Box::whole(shape)}},
        WrittenTensor{"w", "F32", {10, 6}, {Box::whole({10, 6})}}}) {
    const TempDir directory;
    write_checkpoint(directory.path(), {other});
    EXPECT_NE(compute_digests(Reader(real_fs(), directory.path())).weights, first.weights) << other.key;
  }
}

TEST(ReaderTest, ScalarsAndEmptyTensorsAreTensorsToo) {
  const TempDir directory;
  write_checkpoint(directory.path(), {{"scalar", "I64", {}, {Box::whole({})}}, {"empty", "F32", {0, 3}, {}}});
  const Reader reader(real_fs(), directory.path());
  std::vector<std::byte> bytes(8);
  reader.read("scalar", Box::whole({}), bytes);
  reader.read("empty", Box::whole({0, 3}), {});
  EXPECT_EQ(compute_digests(reader).tensors.size(), 2U);
  EXPECT_THAT(verify(real_fs(), directory.path()), IsEmpty());
}

// A manifest with a right checksum that promises what the shards do not hold: found on opening, before any allocation.
TEST(ReaderTest, AManifestThatDoesNotMatchItsShardsIsRefusedOnOpening) {
  const TempDir directory;
  write_checkpoint(directory.path(), {{"w", "F32", {6}, {Box::whole({6})}}});
  const std::string path = directory.path() + "/" + kManifestName;
  const Manifest honest = parse_manifest(read_text(real_fs(), path, kMaxManifestBytes), path);
  const auto complaint = [&](const std::function<void(Manifest&)>& spoil) -> std::string {
    Manifest manifest = honest;
    spoil(manifest);
    std::filesystem::remove(path);
    write_durable(real_fs(), path, encode_manifest(manifest));
    return complaint_of([&] { const Reader reader(real_fs(), directory.path()); });
  };
  const int64_t huge = int64_t{1} << 50;
  EXPECT_EQ(complaint([](Manifest&) {}), "");
  EXPECT_THAT(complaint([](Manifest& m) { m.tensors["v"] = m.tensors["w"]; }), HasSubstr("'v'"));
  EXPECT_THAT(complaint([](Manifest& m) { m.tensors["w"].dtype = "I32"; }), HasSubstr("another shape or dtype"));
  EXPECT_THAT(complaint([&](Manifest& m) {
                m.tensors["w"] = {"F32", {huge}, {{Box::whole({huge}), 0}}};
              }),
              HasSubstr("another shape or dtype"));
  EXPECT_THAT(complaint([](Manifest& m) { m.files[0].bytes += 1; }), HasSubstr("the manifest says"));
  EXPECT_THAT(complaint([](Manifest& m) { m.files[0].header_crc += 1; }), HasSubstr("header fails its checksum"));
}

TEST(VerifyTest, NamesFileTensorAndChunkOfEachDamage) {
  const std::vector<int64_t> shape = {3000, 1000};
  const TempDir directory;
  write_checkpoint(directory.path(), {{"w", "F32", shape, rows(shape, 2, 0)}, {"b", "F32", {5}, {Box::whole({5})}}});
  uint64_t told = 0;
  EXPECT_THAT(verify(real_fs(), directory.path(),
                     [&](uint64_t done, uint64_t total) {
                       EXPECT_LE(done, total);
                       told = done;
                     }),
              IsEmpty());
  EXPECT_EQ(told, 3000U * 1000 * 4 + 20);
  const std::string shard = directory.path() + "/" + shard_name(1, 2);
  {
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-1, std::ios::end);
    file.put('!');
  }
  EXPECT_THAT(verify(real_fs(), directory.path()),
              ElementsAre(testing::AllOf(HasSubstr("tensor 'w'"), HasSubstr(shard_name(1, 2)), HasSubstr("chunk 1"))));
  std::filesystem::remove(shard);
  EXPECT_THAT(verify(real_fs(), directory.path()), ElementsAre(HasSubstr("No such file")));
}

// A forger who makes every CRC anew, and then the sums too.
TEST(VerifyTest, Sha256TellsAForgedShardAndTheExpectedOneAForgedManifest) {
  const std::vector<int64_t> shape = {3000, 500};
  const std::vector<WrittenTensor> tensors = {{"w", "F32", shape, rows(shape, 2, 0)}};
  const TempDir honest, forged, plain;
  write_checkpoint(honest.path(), tensors, 0, /*with_sha256=*/true);
  write_checkpoint(forged.path(), tensors, /*salt=*/1, /*with_sha256=*/true);
  write_checkpoint(plain.path(), tensors);
  const auto manifest_of = [](const TempDir& directory) {
    return parse_manifest(slurp(directory.path() + "/" + kManifestName), kManifestName);
  };
  for (const StoredFile& file : manifest_of(honest).files)
    EXPECT_EQ(file.sha256, sha256(slurp(honest.path() + "/" + file.name))) << "of the file as it is";
  Authenticity genuine{.expected = sha256(slurp(honest.path() + "/" + kManifestName))};
  EXPECT_THAT(verify(real_fs(), honest.path(), {}, 0, &genuine), IsEmpty());
  EXPECT_EQ(genuine.found, genuine.expected);

  EXPECT_THAT(verify(real_fs(), forged.path()), IsEmpty()) << "a good checkpoint of its own";
  EXPECT_THAT(verify(real_fs(), forged.path(), {}, 0, &genuine),
              ElementsAre(HasSubstr("expected was " + genuine.expected)));
  EXPECT_THAT(verify(real_fs(), plain.path()), IsEmpty());
  Authenticity of_plain{.expected = sha256(slurp(plain.path() + "/" + kManifestName))};
  EXPECT_THAT(verify(real_fs(), plain.path(), {}, 0, &of_plain), ElementsAre(HasSubstr("--checkpoint_sha256")));

  Manifest manifest = manifest_of(honest);  // one shard exchanged, its CRCs made to fit
  manifest.files[1].header_crc = manifest_of(forged).files[1].header_crc;
  const std::string name = manifest.files[1].name, path = honest.path() + "/" + kManifestName;
  std::filesystem::copy_file(forged.path() + "/" + name, honest.path() + "/" + name,
                             std::filesystem::copy_options::overwrite_existing);
  std::filesystem::remove(path);
  write_durable(real_fs(), path, encode_manifest(manifest));
  EXPECT_THAT(verify(real_fs(), honest.path()), ElementsAre(testing::AllOf(HasSubstr(name), HasSubstr("SHA-256"))));
}

TEST(VerifyTest, StorageThatCannotBeReadGivesNoVerdict) {
  const TempDir directory;
  write_checkpoint(directory.path(), {{"w", "F32", {4}, {Box::whole({4})}}});
  for (const char* file : {"MANIFEST", "shard"}) {
    for (const char* what : {"open", "read"}) {
      FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
        return kind == what && path.find(file) != std::string::npos ? Fault{.error_number = EIO} : Fault{};
      });
      EXPECT_THROW(verify(fs, directory.path()), IoError) << what << " " << file;
    }
  }
}

TEST(VerifyTest, RefusesLinksFifosAndFoldersInPlaceOfShards) {
  const TempDir directory, elsewhere;
  write_checkpoint(directory.path(), {{"w", "F32", {4}, {Box::whole({4})}}});
  const std::string shard = directory.path() + "/" + shard_name(0, 1);
  std::filesystem::rename(shard, elsewhere.path() + "/shard");
  std::filesystem::create_symlink(elsewhere.path() + "/shard", shard);
  EXPECT_EQ(verify(real_fs(), directory.path()).size(), 1U);
  std::filesystem::remove(shard);
  ASSERT_EQ(mkfifo(shard.c_str(), 0600), 0);
  EXPECT_EQ(verify(real_fs(), directory.path()).size(), 1U);
  std::filesystem::remove(shard);
  std::filesystem::create_directory(shard);
  EXPECT_EQ(verify(real_fs(), directory.path()).size(), 1U);
}

// Flip, zero, truncate, extend, swap, splice from another checkpoint, delete: verification sees every one.
TEST(VerifyTest, AThousandRandomDamagesAreAllDetected) {
  const std::vector<int64_t> shape = {50, 40};
  const std::vector<WrittenTensor> tensors = {{"w", "F32", shape, rows(shape, 3, 0)},
                                              {"v", "BF16", shape, rows(shape, 3, 1)}};
  const TempDir good, older;
  write_checkpoint(good.path(), tensors);
  write_checkpoint(older.path(), tensors, /*salt=*/1);
  std::mt19937 random(17);
  for (int round = 0; round < 1000; ++round) {
    const TempDir victim;
    std::filesystem::copy(good.path(), victim.path());
    const std::string what = damage(victim.path(), older.path(), random);
    if (what.empty()) continue;
    EXPECT_FALSE(verify(real_fs(), victim.path(), {}, 1).empty()) << "round " << round << ": " << what;
  }
  EXPECT_THAT(verify(real_fs(), good.path()), IsEmpty());
}

TEST(WriterTest, AShardIsReservedFirstAndSyncedBeforeItIsClosed) {
  const TempDir directory;
  FaultFs recording(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
  const std::vector<std::byte> bytes(40);
  write_shard(recording, directory.path() + "/s", {{"w", "F32", Box::whole({10}), bytes}});
  std::vector<std::string> kinds;
  for (const std::string& line : recording.log()) kinds.push_back(line.substr(0, line.find(' ')));
  EXPECT_THAT(kinds, ElementsAre("open", "allocate", "write", "write", "sync", "close"));
}

TEST(WriterTest, BytesThatDoNotFitTheirBoxAreABug) {
  const TempDir directory;
  const std::vector<std::byte> bytes(39);
  EXPECT_THROW(write_shard(real_fs(), directory.path() + "/s", {{"w", "F32", Box::whole({10}), bytes}}), CheckFailed);
}

// FORMAT.md shows the bytes of a tiny checkpoint; they must be what the code writes.
TEST(FormatPageTest, TheWorkedExampleIsWhatTheCodeWrites) {
  const TempDir directory;
  const std::array<float, 3> values = {1, 2, 3};
  const std::string name = shard_name(0, 1);
  write_shard(real_fs(), directory.path() + "/" + name,
              {{"bias", "F32", Box::whole({3}), std::as_bytes(std::span(values))}});
  Manifest manifest{.step = 10, .epoch = 1, .samples = 80, .world_size = 1};
  manifest.config_json = R"({"learning_rate":0.001})";
  manifest.data_fingerprint = "5f0c";
  manifest.files = {describe_shard(real_fs(), directory.path(), name)};
  manifest.tensors["bias"] = {"F32", {3}, {{Box::whole({3}), 0}}};
  write_durable(real_fs(), directory.path() + "/MANIFEST", encode_manifest(manifest));

  const std::string page = slurp(std::string(LOCKSTEP_SOURCE_DIR) + "/checkpoint/format/FORMAT.md");
  const std::string shard = slurp(directory.path() + "/" + name);
  const size_t json_end = shard.rfind('}');
  EXPECT_THAT(page, HasSubstr(shard.substr(8, json_end - 7)));
  EXPECT_THAT(page, HasSubstr(encode_manifest(manifest)));
  EXPECT_THAT(page, HasSubstr(std::to_string(shard.size()) + " bytes"));
  const CheckpointDigests digests = compute_digests(Reader(real_fs(), directory.path()));
  EXPECT_THAT(page, HasSubstr(digests.tensors.at("bias")));
  EXPECT_THAT(page, HasSubstr(digests.weights));
}

}  // namespace
}  // namespace lockstep::format
