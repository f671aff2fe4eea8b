#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>

#include "../temp_dir.h"
#include "complaint.h"

namespace lockstep::format {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

Manifest example() {
  Manifest manifest{.step = 1000, .epoch = 3, .samples = 32'000, .world_size = 2, .parent_step = 900};
  manifest.config_json = R"({"learning_rate":0.001})";
  manifest.record_json = R"({"torch":"2.11"})";
  manifest.data_fingerprint = "abc";
  manifest.files = {{"shard-00001-model-00001-of-00002.safetensors", 1024, 0xdeadbeef},
                    {"shard-00002-model-00001-of-00002.safetensors", 512, 7, std::string(62, 'c') + "3b"}};
  manifest.tensors["w"] = {"F32", {3, 4}, {{{{0, 0}, {2, 4}}, 0}, {{{2, 0}, {1, 4}}, 1}}};
  manifest.tensors["exp_avg:w"] = {"F32", {3, 4}, {{{{0, 0}, {3, 4}}, 1}}};
  manifest.tensors["scalar"] = {"I64", {}, {{{{}, {}}, 0}}};
  manifest.tensors["empty"] = {"F32", {0}, {}};
  return manifest;
}

// Puts a right checksum under any text, as somebody who tampers would.
std::string sign(const std::string& body) { return body + "crc32c " + hex8(crc32c(body)) + "\n"; }

std::string manifest_complaint(const std::string& text) {
  return complaint_of([&] { parse_manifest(text, "dir/MANIFEST"); });
}

TEST(ManifestTest, ComesBackAsItWas) {
  const Manifest before = example(), after = parse_manifest(encode_manifest(before), "p");
  EXPECT_EQ(after.step, before.step);
  EXPECT_EQ(after.epoch, before.epoch);
  EXPECT_EQ(after.samples, before.samples);
  EXPECT_EQ(after.world_size, before.world_size);
  EXPECT_EQ(after.parent_step, before.parent_step);
  EXPECT_EQ(after.config_json, before.config_json);
  EXPECT_EQ(after.record_json, before.record_json);
  EXPECT_EQ(after.data_fingerprint, before.data_fingerprint);
  ASSERT_EQ(after.files.size(), 2U);
  EXPECT_EQ(after.files[0].name, before.files[0].name);
  EXPECT_EQ(after.files[0].bytes, 1024U);
  EXPECT_EQ(after.files[0].header_crc, 0xdeadbeefU);
  EXPECT_EQ(after.files[0].sha256, "") << "files without one are as they always were";
  EXPECT_EQ(after.files[1].sha256, before.files[1].sha256);
  ASSERT_EQ(after.tensors.size(), 4U);
  EXPECT_EQ(after.tensors.at("w").boxes[1].box, (Box{{2, 0}, {1, 4}}));
  EXPECT_EQ(after.tensors.at("w").boxes[1].file, 1U);
  EXPECT_EQ(encode_manifest(after), encode_manifest(before));
}

TEST(ManifestTest, AnyFlippedBitTruncationOrExtensionFailsTheChecksum) {
  const std::string text = encode_manifest(example());
  for (size_t byte = 0; byte < text.size(); ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = text;
      flipped[byte] = static_cast<char>(flipped[byte] ^ (1 << bit));
      ASSERT_THAT(manifest_complaint(flipped), HasSubstr("fails its checksum")) << "byte " << byte << " bit " << bit;
    }
    ASSERT_NE(manifest_complaint(text.substr(0, byte)), "");
  }
  EXPECT_NE(manifest_complaint(text + "\n"), "");
  EXPECT_NE(manifest_complaint(text + text), "");
}

TEST(ManifestTest, EveryHostileManifestIsRefusedThoughItsChecksumIsRight) {
  const std::string good = encode_manifest(example());
  const std::string body = good.substr(0, good.size() - 16);
  ASSERT_EQ(manifest_complaint(sign(body)), "");
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = body;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return sign(text.replace(at, from.size(), to));
  };
  std::string deep(40, '[');
  const std::string first = "shard-00001-model-00001-of-00002.safetensors";
  const std::pair<std::string, std::string> cases[] = {
      {replaced(first, "../../etc/passwd"), "could lie elsewhere"},
      {replaced(first, "/etc/passwd"), "could lie elsewhere"},
      {replaced(first, ".."), "could lie elsewhere"},
      {replaced(first, ""), "could lie elsewhere"},
      {replaced(first, "a\\u0000b"), "could lie elsewhere"},
      {replaced(first, std::string(201, 'a')), "could lie elsewhere"},
      {replaced(first, "shard-00002-model-00001-of-00002.safetensors"), "twice"},
      {replaced("\"bytes\":1024", "\"bytes\":-1"), "negative"},
      {replaced("\"bytes\":1024", "\"bytes\":1e30"), "no integer"},
      {replaced("deadbeef", "deadbeeg"), "bad checksum"},
      {replaced("deadbeef", "+eadbeef"), "bad checksum"},
      {replaced("ccc3b", "ccc3"), "no SHA-256"},
      {replaced("ccc3b", "ccc3bb"), "no SHA-256"},
      {replaced("ccc3b", "ccc3B"), "no SHA-256"},
      {replaced("ccc3b", "ccc3g"), "no SHA-256"},
      {replaced(std::string(62, 'c') + "3b", ""), "no SHA-256"},
      {replaced("\"step\":1000", "\"step\":-5"), "negative"},
      {replaced("\"step\":1000", "\"step\":1000,\"step\":1001"), "the key 'step' twice"},
      {replaced("\"step\":1000", "\"step\":99999999999999999999"), "no integer"},
      {replaced("\"file\":1", "\"file\":2"), "lies in file 2 of 2"},
      {replaced("\"offsets\":[2,0]", "\"offsets\":[1,0]"), "overlap, stick out or leave a gap"},
      {replaced("\"offsets\":[2,0]", "\"offsets\":[9223372036854775807,0]"), "overlap, stick out or leave a gap"},
      {replaced("\"sizes\":[1,4]", "\"sizes\":[1]"), "overlap, stick out or leave a gap"},
      {replaced("\"sizes\":[1,4]", "\"sizes\":[true,4]"), "not made of counts"},
      {replaced("\"shape\":[3,4]", "\"shape\":[3037000500,3037000500]"), "impossible shape"},
      {replaced("\"step\":1000", "\"step\":1000,\"x\":" + deep + std::string(40, ']')), "deeper than 32"},
      {replaced("\"shape\":[3,4]", "\"shape\":[[3,4]]"), "not made of counts"},
      {replaced("\"shape\":[3,4]", "\"shape\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]"), "more than 16"},
      {replaced("\"config\":{", "\"config\":{\"x\":\"" + std::string(1 << 20, 'x') + "\","), "more than 1048576 bytes"},
      {replaced("\"config\":{\"learning_rate\":0.001}", "\"config\":[]"), "no object"},
      {replaced("\"config\":{\"learning_rate\":0.001}", "\"config\":{\"a\":1e999}"), "not valid JSON"},
      {replaced("\"data\":\"abc\"", "\"data\":\"" + std::string(1025, 'x') + "\""), "more than 1024 bytes"},
      {replaced("\"data\":\"abc\",", ""), "lacks 'data'"},
      {replaced("\"dtype\":\"F32\"", "\"dtype\":\"\\u001b[2J\""), "unknown dtype '?[2J'"},
      {replaced("\"dtype\":\"F32\"", "\"dtype\":\"pickle\""), "unknown dtype"},
      {replaced("\"w\":", "\"\":"), "without a lawful name"},
      {replaced("\"w\":", "\"" + std::string(1025, 'w') + "\":"), "without a lawful name"},
      {replaced("lockstep-checkpoint", "something-else"), "no lockstep checkpoint"},
      {sign("[]\n"), "no object"},
      {sign("{}\n"), "lacks 'format'"},
      {sign("{\"format\":\n"), "not valid JSON"},
      {sign("\n"), "not valid JSON"},
  };
  for (const auto& [text, said] : cases) EXPECT_THAT(manifest_complaint(text), HasSubstr(said)) << text.substr(0, 300);
}

TEST(ManifestTest, AnotherFormatVersionSaysToUseAnotherProgram) {
  std::string text = encode_manifest(example());
  text = text.substr(0, text.size() - 16);
  text.replace(text.find("\"version\":1"), 11, "\"version\":2");
  EXPECT_THROW(parse_manifest(sign(text), "p"), ConfigError);
}

TEST(ManifestTest, TenThousandMutantsWithRightChecksumsNeverDoWorseThanAnError) {
  const std::string good = encode_manifest(example());
  const std::string body = good.substr(0, good.size() - 16);
  std::mt19937 random(3);
  for (int round = 0; round < 10'000; ++round) {
    std::string mutant = body;
    for (size_t change = 0; change <= random() % 4; ++change) {
      const size_t at = random() % mutant.size();
      if (random() % 2) {
        mutant[at] = "{}[]\",:0123456789-.eE\\\x80"[random() % 22];
      } else {
        mutant.replace(at, random() % 8, mutant.substr(random() % mutant.size(), random() % 30));
      }
    }
    try {
      parse_manifest(sign(mutant), "p");
    } catch (const Error&) {
    }
  }
}

TEST(ManifestTest, WhatCouldNotBeReadAgainIsNotWritten) {
  const auto spoilt = [](const std::function<void(Manifest&)>& spoil) {
    Manifest manifest = example();
    spoil(manifest);
    return manifest;
  };
  EXPECT_NO_THROW(encode_manifest(spoilt([](Manifest&) {})));
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.files[0].name = "../s"; })), CheckFailed);
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.files[1].name = m.files[0].name; })), CheckFailed);
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.tensors["w"].boxes.pop_back(); })), CheckFailed);
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.tensors["w"].boxes[0].file = 2; })), CheckFailed);
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.config_json = "[]"; })), CheckFailed);
  EXPECT_THROW(encode_manifest(spoilt([](Manifest& m) { m.data_fingerprint = std::string(65 << 20, 'x'); })),
               CheckFailed);
}

// A budget could be kept by refusing everything: what a large run writes must load.
TEST(ManifestTest, AManifestOf400TensorsOn1024RanksIsRead) {
  Manifest manifest;
  constexpr int64_t kRanks = 1024;
#ifdef LOCKSTEP_SANITIZED  // half a minute for the whole
  constexpr size_t kTensors = 40;
#else
  constexpr size_t kTensors = 400;
#endif
  for (int64_t rank = 0; rank < kRanks; ++rank) manifest.files.push_back({shard_name(rank, kRanks), 1, 1});
  for (size_t i = 0; i < kTensors; ++i) {
    StoredTensor& tensor =
        manifest.tensors["exp_avg_sq:model.layers." + std::to_string(i) + ".mlp.down_proj.weight"] = {
            "F32", {8 * kRanks, 4096}, {}};
    for (int64_t rank = 0; rank < kRanks; ++rank)
      tensor.boxes.push_back({{{8 * rank, 0}, {8, 4096}}, static_cast<size_t>(rank)});
  }
  EXPECT_EQ(parse_manifest(encode_manifest(manifest), "MANIFEST").tensors.size(), kTensors);
}

TEST(ManifestTest, AConfigurationThatIsNoJsonIsABugOfTheCaller) {
  Manifest manifest = example();
  manifest.config_json = "{oops";
  EXPECT_THROW(encode_manifest(manifest), CheckFailed);
}

class CandidatesTest : public testing::Test {
 protected:
  void make(const std::string& name, bool complete = true) {
    std::filesystem::create_directories(run() + "/checkpoints/" + name);
    if (complete) std::ofstream(run() + "/checkpoints/" + name + "/MANIFEST") << "x";
  }
  std::string run() const { return directory_.path(); }
  std::vector<std::string> names() {
    std::vector<std::string> names;
    for (const auto& candidate : list_candidates(real_fs(), run() + "/checkpoints"))
      names.push_back(std::filesystem::path(candidate.path).filename());
    return names;
  }

 private:
  TempDir directory_;
};

TEST_F(CandidatesTest, ALaterEpochWinsEvenWithALowerStep) {
  make("step-00000300.e0001");
  make("step-00000100.e0002");
  make("step-00000200.e0002");
  make("step-123456789.e0001");
  EXPECT_THAT(names(),
              ElementsAre("step-00000200.e0002", "step-00000100.e0002", "step-123456789.e0001", "step-00000300.e0001"));
}

TEST_F(CandidatesTest, OtherNamesAndSecondSpellingsAreIgnored) {
  for (const char* name :
       {"step-1.e0001", "step-00000001.e1", "step-000000001.e0001", "step-00000001.e0001.bak", "step--0000001.e0001",
        "step-00000001.e-001", "latest", "step-99999999999999999999.e0001", "step- 0000001.e0001"})
    make(name);
  EXPECT_THAT(names(), ElementsAre());
  EXPECT_TRUE(list_candidates(real_fs(), run() + "/nowhere").empty());
}

TEST_F(CandidatesTest, ARunMeansItsNewestCompleteCheckpointOutsideQuarantine) {
  make("step-00000100.e0001");
  make("step-00000200.e0001");
  make("step-00000300.e0001", /*complete=*/false);
  real_fs().create_exclusive(run() + "/checkpoints/step-00000200.e0001/QUARANTINED", 0600)->close();
  EXPECT_EQ(resolve_checkpoint(real_fs(), run()), run() + "/checkpoints/step-00000100.e0001");
  EXPECT_EQ(resolve_checkpoint(real_fs(), run() + "/checkpoints/step-00000200.e0001"),
            run() + "/checkpoints/step-00000200.e0001");
  EXPECT_THROW(resolve_checkpoint(real_fs(), run() + "/checkpoints"), ConfigError);
}

TEST(NamesTest, AreFixed) {
  EXPECT_EQ(directory_name(1000, 1), "step-00001000.e0001");
  EXPECT_EQ(directory_name(123456789, 12345), "step-123456789.e12345");
  EXPECT_EQ(shard_name(0, 4), "shard-00001-model-00001-of-00004.safetensors");
  EXPECT_EQ(tensor_key("weights", "a.b"), "a.b");
  EXPECT_EQ(section_of(tensor_key("exp_avg", "a.b")), "exp_avg");
  EXPECT_EQ(section_of("a.b"), "weights");
}

}  // namespace
}  // namespace lockstep::format
