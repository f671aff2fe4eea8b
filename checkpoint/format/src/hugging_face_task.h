#pragma once

#include <cstdint>
#include <string>

#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>

namespace lockstep::format {

inline constexpr const char* kHeadName = "lm_head.weight";  ///< never has a prefix
inline constexpr int64_t kStepElements = 1 << 20;           ///< handled at a time: 4 MiB as f32

/// The configuration as runs of examples/gpt have it in their manifests: {"task.model": "llama", ...}.
std::string task_of(const HuggingFaceConfig& config);
/// The way back. @throws ConfigError not of such a run, or of a model without a form in Hugging Face's terms.
HuggingFaceConfig config_of_task(const Manifest& manifest, const std::string& what);
std::string import_record(const std::string& dtype);
/// The config.json of a folder whose weights are `dtype`.
std::string hugging_face_config_text(const HuggingFaceConfig& config, const std::string& dtype);

/// The shortest decimal that is this number again.
std::string number_text(double value);

/// to[c * to_stride + r] = from[r * from_stride + c].
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

}  // namespace lockstep::format
