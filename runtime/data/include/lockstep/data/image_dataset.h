#pragma once

#include <memory>
#include <string>

#include <lockstep/data/dataset.h>

namespace lockstep::data {

struct ImageDatasetOptions {
  int64_t channels = 1, height = 28, width = 28;
  int64_t num_classes = 10;
  /// Which part: samples are dealt in file order, every `holdout_every`-th (5 = 20 %) to validation. 0: all samples.
  int64_t holdout_every = 0;
  bool validation = false;
};

/// Images from CSV rows of channels*height*width values 0..255, then the label, plain or gzip-compressed. Decoded once
/// into memory. Batch: tensors = {pixels [B, C, H, W] f32 scaled to [0, 1], labels [B] i64}.
/// @throws ConfigError missing file. @throws CorruptData naming row and column.
std::shared_ptr<const Dataset> open_image_dataset(const std::string& files, ImageDatasetOptions options);

}  // namespace lockstep::data
