#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

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
    format::write_checkpoint(checkpoint_, {{"layer.weight", "F32", {7, 5}, {upper, lower}},
                                           {"bias", "BF16", {13}, {Box::whole({13})}},
                                           {"exp_avg:bias", "F32", {13}, {Box::whole({13})}}});
  }
  std::string shard(int64_t file) const { return checkpoint_ + "/" + format::shard_name(file, 2); }
  void damage_last_byte() const {  // of the second file: the lower part of layer.weight
    std::fstream file(shard(1), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-1, std::ios::end);
    const int byte = file.get();
    file.seekp(-1, std::ios::end);
    file.put(static_cast<char>(byte ^ 1));
  }

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

TEST_F(InspectTest, VerifyMissesAFileThatIsGone) {
  std::filesystem::remove(shard(0));
  const Ended ended = lockstep_run({"verify", checkpoint_});
  EXPECT_EQ(ended.code, 65) << ended.out << ended.err;
  EXPECT_THAT(ended.out + ended.err, HasSubstr(std::filesystem::path(shard(0)).filename().string()));
}

}  // namespace
}  // namespace lockstep
