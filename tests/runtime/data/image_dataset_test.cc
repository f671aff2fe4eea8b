#include <gtest/gtest.h>
#include <zlib.h>

#include <lockstep/base/error.h>
#include <lockstep/data/image_dataset.h>

#include "data_folder.h"

namespace lockstep::data {
namespace {

const ImageDatasetOptions kImageOptions{.channels = 1, .height = 2, .width = 2, .num_classes = 10};

std::string rows(int n) {
  std::string text;
  for (int i = 0; i < n; ++i) {
    for (int pixel = 0; pixel < 4; ++pixel) text += std::to_string((i * 37 + pixel * 101) % 256) + ",";
    text += std::to_string(i % 10) + (i % 2 == 0 ? "\n" : "\r\n");
  }
  return text;
}

std::string zipped(const DataFolder& folder, const std::string& text) {
  std::string path = folder.path("x.csv.gz");
  gzFile file = gzopen(path.c_str(), "wb");
  gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
  gzclose(file);
  return path;
}

void expect_rows(const Dataset& dataset, int n) {
  ASSERT_EQ(dataset.size(), n);
  std::vector<int64_t> indices;
  for (int i = n - 1; i >= 0; --i) indices.push_back(i);
  const Batch batch = dataset.get(indices);
  for (int row = 0; row < n; ++row) {
    const auto i = indices[row];
    EXPECT_EQ(batch.tensors[1].const_data_ptr<int64_t>()[row], i % 10);
    for (int64_t pixel = 0; pixel < 4; ++pixel) {
      EXPECT_FLOAT_EQ(batch.tensors[0][row].const_data_ptr<float>()[pixel],
                      static_cast<float>((i * 37 + pixel * 101) % 256) / 255.0f);
    }
  }
}

TEST(ImageDatasetTest, ReadsPlainAndCompressedRows) {
  const DataFolder folder;
  expect_rows(*open_image_dataset(folder.write("x.csv", rows(23)), kImageOptions), 23);
  expect_rows(*open_image_dataset(zipped(folder, rows(23)), kImageOptions), 23);
}

TEST(ImageDatasetTest, TrainingAndValidationShareOutTheRows) {
  const DataFolder folder;
  auto options = kImageOptions;
  options.holdout_every = 5;
  const auto path = folder.write("x.csv", rows(23));
  const auto training = open_image_dataset(path, options);
  options.validation = true;
  const auto validation = open_image_dataset(path, options);
  EXPECT_EQ(training->size(), 19);
  EXPECT_EQ(validation->size(), 4);
  EXPECT_NE(training->fingerprint(), validation->fingerprint());
  const std::vector<int64_t> all{0, 1, 2, 3};
  const Batch batch = validation->get(all);
  const std::vector<int64_t> expected{4, 9, 4, 9};  // rows 4, 9, 14, 19
  EXPECT_EQ(
      std::vector<int64_t>(batch.tensors[1].const_data_ptr<int64_t>(), batch.tensors[1].const_data_ptr<int64_t>() + 4),
      expected);
}

TEST(ImageDatasetTest, ADamagedRowIsNamedWithRowAndColumn) {
  const DataFolder folder;
  for (const auto& [bad, column] : std::vector<std::pair<std::string, int>>{{"1,2,3", 3},
                                                                            {"1,256,3,4,5", 2},
                                                                            {"1,2,-3,4,5", 3},
                                                                            {"1,2,3,4,10", 5},
                                                                            {"1,2,3,4.5,5", 4},
                                                                            {"1,x,3,4,5", 2},
                                                                            {"1,2,3,4,5,6", 5},
                                                                            {"1,nan,3,4,5", 2},
                                                                            {"1,1e300,3,4,5", 2}}) {
    const auto path = folder.write("x.csv", rows(2) + bad + "\n");
    const auto message = message_of<CorruptData>([&] { open_image_dataset(path, kImageOptions); });
    EXPECT_NE(message.find("row 3, column " + std::to_string(column)), std::string::npos) << bad << ": " << message;
  }
}

TEST(ImageDatasetTest, ACutOrDamagedArchiveIsCorruptData) {
  const DataFolder folder;
  const auto path = zipped(folder, rows(500));
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  for (const size_t length : {bytes.size() - 1, bytes.size() - 9, bytes.size() / 2}) {
    folder.write("x.csv.gz", bytes.substr(0, length));
    EXPECT_THROW(open_image_dataset(path, kImageOptions), CorruptData) << length << " of " << bytes.size() << " bytes";
  }
}

TEST(ImageDatasetTest, MissingFilesAndAnEmptySplitAreConfigErrors) {
  const DataFolder folder;
  EXPECT_THROW(open_image_dataset(folder.path("absent.csv"), kImageOptions), ConfigError);
  auto options = kImageOptions;
  options.holdout_every = 5;
  options.validation = true;
  EXPECT_THROW(open_image_dataset(folder.write("x.csv", rows(3)), options), ConfigError);
}

}  // namespace
}  // namespace lockstep::data
