// import and export: weights between our checkpoints and Hugging Face folders.
#include <algorithm>
#include <iostream>
#include <limits>

#include <lockstep/base/error.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kImportFlags = {};
const std::vector<Arguments::Flag> kExportFlags = {
    {"format", "hf", "of the folder: hf, a config.json with safetensors files, is the default and the only one"},
    {"dtype", "f32|bf16|f16", "of the weights in it, rounded to nearest (f32)"},
    {"max_shard_bytes", "N", "weights go into several files of at most this size (5000000000)"},
    {"trust_foreign_checkpoint", nullptr, "also one whose files belong to another user"},
};

struct TwoPaths {
  std::string from, to;
};
TwoPaths two_paths(const Arguments& arguments, const char* usage) {
  if (arguments.words().size() != 2 || arguments.has_rest())
    throw ConfigError(std::string("two paths are needed: lockstep ") + usage);
  return {without_slash(arguments.words()[0]), without_slash(arguments.words()[1])};
}

int import_folder(const Arguments& arguments) {
  const auto [directory, out] = two_paths(arguments, kImport.usage);
  format::import_hugging_face(real_fs(), directory, out, &show_progress);
  std::cout << out << ": weights of step 0. Go on with: gpt --flagfile=" << out << "/model.flags --init_from=" << out
            << " ...\n";
  return 0;
}

int export_folder(const Arguments& arguments) {
  const auto [checkpoint_or_run, out] = two_paths(arguments, kExport.usage);
  if (const std::string name = arguments.get("format", "hf"); name != "hf")
    throw ConfigError("--format=" + name + " is unknown. Mend: --format=hf");
  const std::string dtype = arguments.get("dtype", "f32");
  format::HuggingFaceExport options;
  if (dtype == "f32" || dtype == "bf16" || dtype == "f16") {
    options.dtype = dtype == "f32" ? "F32" : dtype == "bf16" ? "BF16" : "F16";
  } else {
    throw ConfigError("--dtype=" + dtype + " is none of f32, bf16, f16");
  }
  options.max_file_bytes = static_cast<uint64_t>(arguments.number(
      "max_shard_bytes", static_cast<int64_t>(options.max_file_bytes), 1, std::numeric_limits<int64_t>::max()));
  if (arguments.has("trust_foreign_checkpoint")) options.trust = format::Trust::kAny;
  const std::string checkpoint = format::resolve_checkpoint(real_fs(), checkpoint_or_run);
  format::export_hugging_face(real_fs(), checkpoint, out, options, &show_progress);
  std::cout << out << ": the weights of " << checkpoint << ". Tokenizer files are to be copied from where they are\n";
  return 0;
}

}  // namespace

const Verb kImport = {
    "import", "import HF_DIR OUT",
    "Makes a checkpoint of a Hugging Face folder (GPT-2 or Llama, safetensors), with the flags that gpt "
    "needs for it in OUT/model.flags.",
    &kImportFlags, &import_folder};
const Verb kExport = {"export", "export CHECKPOINT|RUN OUT [--format hf] [--dtype f32|bf16|f16] [--max_shard_bytes N]",
                      "Makes a Hugging Face folder of the weights of gpt; of a run, its newest durable checkpoint.",
                      &kExportFlags, &export_folder};

}  // namespace lockstep::launcher
