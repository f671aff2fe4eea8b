#include <algorithm>
#include <array>
#include <cstring>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/data/token_dataset.h>

#include "files.h"
#include "token_file.h"

namespace lockstep::data {
namespace {

class TokenDataset final : public Dataset {
 public:
  TokenDataset(const std::string& pattern, TokenDatasetOptions options) : options_(options) {
    LOCKSTEP_CHECK(options_.sequence_length > 0 && options_.vocab_size > 0)
        << "sequence_length and vocab_size must be set";
    for (const std::string& path : expand_files(pattern)) {
      if (path.ends_with(".idx")) continue;  // Megatron's index belongs to its .bin
      files_.push_back(open_token_file(path));
      starts_.push_back(num_tokens_);
      num_tokens_ += files_.back()->num_tokens();
    }
    if (size() <= 0) {
      throw ConfigError("'" + pattern + "' holds " + std::to_string(num_tokens_) +
                        " tokens, fewer than one sample of " + std::to_string(options_.sequence_length + 1) +
                        ". Mend: more data or a smaller --sequence_length");
    }
  }

  int64_t size() const override { return (num_tokens_ - 1) / options_.sequence_length; }

  Batch get(std::span<const int64_t> indices) const override {
    const int64_t length = options_.sequence_length;
    const auto samples = static_cast<int64_t>(indices.size());
    Batch batch{{at::empty({samples, length}, at::kLong), at::empty({samples, length}, at::kLong)}, samples};
    auto *tokens = batch.tensors[0].mutable_data_ptr<int64_t>(),
         *targets = batch.tensors[1].mutable_data_ptr<int64_t>();
    std::vector<int64_t> sample(length + 1);
    for (int64_t row = 0; row < samples; ++row) {
      read(indices[row] * length, sample);
      std::copy_n(sample.data(), length, tokens + row * length);
      std::copy_n(sample.data() + 1, length, targets + row * length);
    }
    return batch;
  }

  std::string fingerprint() const override {
    std::string text = "tokens " + std::to_string(num_tokens_) + " in " + std::to_string(files_.size()) + " files, T " +
                       std::to_string(options_.sequence_length);
    for (const auto& file : files_) text += ", " + file->fingerprint();
    return text;
  }

 private:
  // The tokens from `position` on, across file borders.
  void read(int64_t position, std::span<int64_t> tokens) const {
    size_t file = std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
    while (!tokens.empty()) {
      const int64_t offset = position - starts_[file];
      const auto n = std::min(static_cast<int64_t>(tokens.size()), files_[file]->num_tokens() - offset);
      files_[file]->read(offset, tokens.first(n), options_.vocab_size);
      tokens = tokens.subspan(n);
      position += n;
      ++file;
    }
  }

  TokenDatasetOptions options_;
  std::vector<std::unique_ptr<TokenFile>> files_;
  std::vector<int64_t> starts_;  // first token of each file
  int64_t num_tokens_ = 0;
};

}  // namespace

std::shared_ptr<const Dataset> open_token_dataset(const std::string& files, TokenDatasetOptions options) {
  return std::make_shared<TokenDataset>(files, options);
}

}  // namespace lockstep::data
