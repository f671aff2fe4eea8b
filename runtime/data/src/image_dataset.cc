#include <charconv>
#include <cmath>
#include <cstring>
#include <memory>

#include <ATen/ops/empty.h>
#include <zlib.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/data/image_dataset.h>

#include "files.h"

namespace lockstep::data {
namespace {

// All bytes of a plain or gzip-compressed file, at most `limit`.
std::string read_all(const std::string& path, size_t limit) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), &gzclose);
  if (!file) throw ConfigError("'" + path + "' cannot be opened. Mend: check its permissions");
  std::string text;
  std::string piece(1 << 20, '\0');
  for (int n = 0; (n = gzread(file.get(), piece.data(), static_cast<unsigned>(piece.size()))) != 0;) {
    if (n < 0) throw CorruptData("'" + path + "' is damaged: its compressed data ends early or fails its checksum");
    text.append(piece, 0, static_cast<size_t>(n));
    if (text.size() > limit)
      throw CorruptData("'" + path + "' unpacks to more than " + std::to_string(limit) + " bytes");
  }
  // A stream cut short ends like a whole one; only the error state tells.
  int state = Z_OK;
  gzerror(file.get(), &state);
  if (state != Z_OK)
    throw CorruptData("'" + path + "' is damaged: its compressed data ends early. Mend: fetch it again");
  return text;
}

class ImageDataset : public Dataset {
 public:
  ImageDataset(const std::string& pattern, ImageDatasetOptions options) : options_(options) {
    const int64_t holdout = options.holdout_every;
    for (const std::string& path : expand_files(pattern)) parse_csv(read_all(path, size_t{4} << 30), path);
    for (int64_t i = 0; i < static_cast<int64_t>(labels_.size()); ++i) {
      if (holdout <= 0 || (i % holdout == holdout - 1) == options.validation) chosen_.push_back(i);
    }
    if (chosen_.empty())
      throw ConfigError("'" + pattern + "' leaves no image for this split. Mend: more data, or another hold-out");
  }

  int64_t size() const override { return static_cast<int64_t>(chosen_.size()); }

  Batch get(std::span<const int64_t> indices) const override {
    const auto n = static_cast<int64_t>(indices.size());
    Batch batch{
        {at::empty({n, options_.channels, options_.height, options_.width}, at::kFloat), at::empty({n}, at::kLong)}, n};
    auto* pixels = batch.tensors[0].mutable_data_ptr<float>();
    auto* labels = batch.tensors[1].mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < n; ++row) {
      const int64_t image = chosen_[indices[row]];
      const uint8_t* from = pixels_.data() + image * image_size();
      for (int64_t i = 0; i < image_size(); ++i)
        pixels[row * image_size() + i] = static_cast<float>(from[i]) * (1.0f / 255.0f);
      labels[row] = labels_[image];
    }
    return batch;
  }

  std::string fingerprint() const override {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (const uint8_t pixel : pixels_) hash = (hash ^ pixel) * 0x100000001b3u;
    for (const int64_t label : labels_) hash = (hash ^ static_cast<uint64_t>(label)) * 0x100000001b3u;
    return std::to_string(chosen_.size()) + " of " + std::to_string(labels_.size()) + " images, " +
           std::to_string(hash);
  }

 private:
  int64_t image_size() const { return options_.channels * options_.height * options_.width; }

  // Rows of pixel values 0..255 and the label.
  void parse_csv(const std::string& text, const std::string& path) {
    int64_t row = 0;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      ++row;
      if (end > begin) parse_row(text.data() + begin, text.data() + end, path, row);
      begin = end + 1;
    }
  }

  void parse_row(const char* at, const char* end, const std::string& path, int64_t row) {
    for (int64_t column = 0; column <= image_size(); ++column) {
      double value = 0;
      const auto [next, error] = std::from_chars(at, end, value);
      const bool is_label = column == image_size();
      const double limit = is_label ? static_cast<double>(options_.num_classes) - 1 : 255;
      const bool last_ok = is_label ? (next == end || *next == '\r') : (next != end && *next == ',');
      if (error != std::errc() || !(value >= 0 && value <= limit) || value != std::floor(value) || !last_ok) {
        throw CorruptData("'" + path + "', row " + std::to_string(row) + ", column " + std::to_string(column + 1) +
                          ": expected " + std::to_string(image_size()) + " pixels of 0..255 and a label of 0.." +
                          std::to_string(options_.num_classes - 1));
      }
      if (is_label) {
        labels_.push_back(static_cast<int64_t>(value));
      } else {
        pixels_.push_back(static_cast<uint8_t>(value));
      }
      at = next + 1;
    }
  }

  ImageDatasetOptions options_;
  std::vector<uint8_t> pixels_;
  std::vector<int64_t> labels_, chosen_;
};

}  // namespace

std::shared_ptr<const Dataset> open_image_dataset(const std::string& files, ImageDatasetOptions options) {
  return std::make_shared<ImageDataset>(files, options);
}

}  // namespace lockstep::data
