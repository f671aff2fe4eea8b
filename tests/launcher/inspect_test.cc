#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "../checkpoint/format/written_checkpoint.h"
#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

// A run with one checkpoint: a matrix in two parts, a bias whole, and an average that AdamW keeps.
class InspectTest : public testing::Test {
 protected:
  void SetUp() override {
    make_directories(real_fs(), checkpoint_);
    const Box upper{{0, 0}, {3, 5}}, lower{{3, 0}, {4, 5}};
    format::write_checkpoint(checkpoint_,
                             {{"layer.weight", "F32", {7, 5}, {upper, lower}},
                              {"bias", "BF16", {13}, {Box::whole({13})}},
                              {"exp_avg:bias", "F32", {13}, {Box::whole({13})}}},
                             0, with_sha256_);
  }
  std::string shard(int64_t file) const { return checkpoint_ + "/" + format::shard_name(file, 2); }
  void damage_last_byte() const {  // of the second file: the lower part of layer.weight
    std::fstream file(shard(1), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-1, std::ios::end);
    const int byte = file.get();
    file.seekp(-1, std::ios::end);
    file.put(static_cast<char>(byte ^ 1));
  }

  bool with_sha256_ = false;
  TempDir run_;
  std::string checkpoint_ = run_ / "checkpoints/" + format::directory_name(1, 1);
};

TEST_F(InspectTest, JsonHoldsStepShapesAndDigests) {
  const Ended ended = lockstep_run({"inspect", "--json", checkpoint_});
  ASSERT_EQ(ended.code, 0) << ended.err;
  const auto json = nlohmann::json::parse(ended.out);
  EXPECT_EQ(json["step"], 1);
  EXPECT_EQ(json["tensors"]["layer.weight"]["shape"], (std::vector<int>{7, 5}));
  EXPECT_EQ(json["tensors"]["bias"]["dtype"], "BF16");
  const format::Reader reader(real_fs(), checkpoint_);
  EXPECT_EQ(json["tensors"]["exp_avg:bias"]["digest"], reader.tensor_digest("exp_avg:bias"));
  const auto digests = format::compute_digests(reader);
  EXPECT_EQ(json["weights_digest"], digests.weights);
  EXPECT_EQ(json["optimizer_digest"], digests.optimizer);
  EXPECT_TRUE(json.contains("config"));
}

TEST_F(InspectTest, ARunMeansItsNewestDurableCheckpoint) {
  const std::string newer = run_ / "checkpoints/" + format::directory_name(2, 1);
  make_directories(real_fs(), newer);  // no MANIFEST: its save was cut off
  for (const std::string& path : {run_.path(), run_.path() + "/"}) {
    const Ended ended = lockstep_run({"inspect", "--json", path});
    ASSERT_EQ(ended.code, 0) << ended.err;
    EXPECT_EQ(nlohmann::json::parse(ended.out)["path"], checkpoint_);
  }
}

TEST_F(InspectTest, WithoutDigestsNoTensorByteIsRead) {
  const Ended ended = lockstep_run({"inspect", "--no_digests", checkpoint_});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.out, HasSubstr("layer.weight  F32 [7, 5]"));
  damage_last_byte();
  EXPECT_EQ(lockstep_run({"inspect", "--no_digests", checkpoint_}).code, 0);
  EXPECT_EQ(lockstep_run({"inspect", checkpoint_}).code, 65);
}

TEST_F(InspectTest, VerifyPassesWhatIsWhole) {
  const Ended ended = lockstep_run({"verify", run_.path()});
  EXPECT_EQ(ended.code, 0) << ended.out;
  EXPECT_THAT(ended.out, HasSubstr("every byte is good"));
}

TEST_F(InspectTest, VerifyNamesFileTensorAndChunkOfABadByte) {
  damage_last_byte();
  for (const bool json : {false, true}) {
    const Ended ended = lockstep_run(json ? std::vector<std::string>{"verify", "--json", checkpoint_}
                                          : std::vector<std::string>{"verify", checkpoint_});
    EXPECT_EQ(ended.code, 65) << ended.out;
    for (const char* word : {"shard-00002", "layer.weight", "chunk"}) EXPECT_THAT(ended.out, HasSubstr(word));
  }
}

class AuthenticityTest : public InspectTest {
 protected:
  AuthenticityTest() { with_sha256_ = true; }
  Ended verify(const std::string& hex) const { return lockstep_run({"verify", "--expect_sha256", hex, run_.path()}); }
  std::string shown() const {  // by inspect: what a person notes
    const auto json = nlohmann::json::parse(lockstep_run({"inspect", "--json", "--no_digests", checkpoint_}).out);
    return json.at("manifest_sha256");
  }
};

TEST_F(AuthenticityTest, TheSumThatInspectAndVerifyShowIsTheOneThatIsExpected) {
  const std::string hex = shown();
  EXPECT_EQ(hex, format::sha256(format::slurp(checkpoint_ + "/" + format::kManifestName)));
  EXPECT_THAT(lockstep_run({"inspect", "--no_digests", checkpoint_}).out, HasSubstr("sha256    " + hex));
  EXPECT_THAT(lockstep_run({"verify", checkpoint_}).out, HasSubstr(hex));
  EXPECT_THAT(lockstep_run({"verify", "--json", checkpoint_}).out, HasSubstr("\"manifest_sha256\": \"" + hex + "\""));
  const Ended good = verify(hex);
  EXPECT_EQ(good.code, 0) << good.out << good.err;
}

TEST_F(AuthenticityTest, AnotherOneIsRefusedAndWhatIsNoneIsAMistake) {
  std::string hex = shown();
  hex[0] = hex[0] == '0' ? '1' : '0';
  const Ended other = verify(hex);
  EXPECT_EQ(other.code, 65);
  EXPECT_THAT(other.out, HasSubstr("has the SHA-256 " + shown() + ", expected was " + hex));
  EXPECT_EQ(verify("abc").code, 78);
  EXPECT_EQ(verify("").code, 78);
}

TEST_F(AuthenticityTest, AForgedShardIsNamed) {
  damage_last_byte();
  const Ended ended = verify(shown());
  EXPECT_EQ(ended.code, 65);
  EXPECT_THAT(ended.out, testing::AllOf(HasSubstr("shard-00002"), HasSubstr("has the SHA-256"), HasSubstr("chunk")));
}

TEST_F(InspectTest, WithoutSumsNothingVouchesForTheShards) {
  const std::string hex = format::sha256(format::slurp(checkpoint_ + "/" + format::kManifestName));
  const Ended ended = lockstep_run({"verify", "--expect_sha256=" + hex, checkpoint_});
  EXPECT_EQ(ended.code, 65);
  EXPECT_THAT(ended.out, testing::AllOf(HasSubstr("has no SHA-256"), HasSubstr("--checkpoint_sha256")));
}

TEST_F(InspectTest, VerifyMissesAFileThatIsGone) {
  std::filesystem::remove(shard(0));
  const Ended ended = lockstep_run({"verify", checkpoint_});
  EXPECT_EQ(ended.code, 65) << ended.out << ended.err;
  EXPECT_THAT(ended.out + ended.err, HasSubstr(std::filesystem::path(shard(0)).filename().string()));
}

}  // namespace
}  // namespace lockstep
