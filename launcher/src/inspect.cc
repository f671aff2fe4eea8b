#include <iostream>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

using Json = nlohmann::ordered_json;

const std::vector<Arguments::Flag> kInspectFlags = {
    {"json", nullptr, "one JSON object instead of a table"},
    {"no_digests", nullptr, "read the manifest only: milliseconds, whatever the size"},
};
const std::vector<Arguments::Flag> kVerifyFlags = {
    {"expect_sha256", "HEX",
     "SHA-256 that MANIFEST must have (inspect and verify show it), with one of every shard in it (training: "
     "--checkpoint_sha256): no byte is another than when that was noted"},
    {"json", nullptr, "one JSON object instead of lines"},
};

std::string one_path(const Arguments& arguments, const char* usage) {
  if (arguments.words().size() != 1 || arguments.has_rest())
    throw ConfigError(std::string("one checkpoint or run is needed: lockstep ") + usage);
  return format::resolve_checkpoint(real_fs(), without_slash(arguments.words()[0]));
}

int inspect(const Arguments& arguments) {
  const std::string path = one_path(arguments, kInspect.usage);
  const format::Reader reader(real_fs(), path, format::Trust::kAny);  // looking is how one comes to trust
  const format::Manifest& manifest = reader.manifest();
  const bool with_digests = !arguments.has("no_digests");
  const auto digests = with_digests ? format::compute_digests(reader, &show_progress) : format::CheckpointDigests{};
  uint64_t bytes = 0;
  for (const auto& file : manifest.files) bytes += file.bytes;
  if (arguments.has("json")) {
    Json tensors = Json::object();
    for (const auto& [key, tensor] : manifest.tensors) {
      tensors[key] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}};
      if (with_digests) tensors[key]["digest"] = digests.tensors.at(key);
    }
    Json json = {{"path", path},
                 {"step", manifest.step},
                 {"epoch", manifest.epoch},
                 {"samples", manifest.samples},
                 {"world_size", manifest.world_size},
                 {"bytes", bytes},
                 {"owner", reader.owner_name()},
                 {"manifest_digest", reader.manifest_digest()},
                 {"manifest_sha256", reader.manifest_sha256()},
                 {"config", Json::parse(manifest.config_json)},
                 {"record", Json::parse(manifest.record_json)},
                 {"data", manifest.data_fingerprint}};
    if (with_digests) json["weights_digest"] = digests.weights, json["optimizer_digest"] = digests.optimizer;
    json["tensors"] = tensors;
    std::cout << json.dump(2) << "\n";
    return 0;
  }
  std::cout << path << "\nstep " << manifest.step << ", epoch " << manifest.epoch << ", saved by "
            << manifest.world_size << " ranks, " << manifest.files.size() << " files, " << bytes << " bytes\n";
  std::cout << "manifest  " << reader.manifest_digest() << (reader.is_foreign() ? ", of " + reader.owner_name() : "")
            << "\nsha256    " << reader.manifest_sha256() << "\n";
  const Json config = Json::parse(manifest.config_json);  // named: items() only refers to it
  for (const auto& [name, value] : config.items()) std::cout << "  " << name << " = " << value << "\n";
  for (const auto& [key, tensor] : manifest.tensors) {
    std::cout << "  " << key << "  " << tensor.dtype << " [";
    for (size_t d = 0; d < tensor.shape.size(); ++d) std::cout << (d ? ", " : "") << tensor.shape[d];
    std::cout << "]" << (with_digests ? "  " + digests.tensors.at(key) : "") << "\n";
  }
  if (with_digests) std::cout << "weights   " << digests.weights << "\noptimizer " << digests.optimizer << "\n";
  return 0;
}

std::string expected_sha256(const Arguments& arguments) {
  const auto given = arguments.find("expect_sha256");
  if (given && !format::is_sha256(*given))
    throw ConfigError("--expect_sha256=" + *given + " is no SHA-256. Mend: 64 hex digits, in lower case");
  return given.value_or("");
}

int verify(const Arguments& arguments) {
  format::Authenticity authenticity{.expected = expected_sha256(arguments)};
  const std::string path = one_path(arguments, kVerify.usage);
  const auto problems = format::verify(real_fs(), path, &show_progress, 0, &authenticity);
  if (arguments.has("json")) {
    const Json json = {
        {"path", path}, {"good", problems.empty()}, {"manifest_sha256", authenticity.found}, {"problems", problems}};
    std::cout << json.dump(2) << "\n";
  } else if (problems.empty()) {
    std::cout << path << ": every byte is good; MANIFEST has the SHA-256 " << authenticity.found << "\n";
  } else {
    for (const std::string& problem : problems) std::cout << problem << "\n";
  }
  return problems.empty() ? 0 : static_cast<int>(ExitCode::kBadData);
}

}  // namespace

const Verb kInspect = {"inspect", "inspect CHECKPOINT|RUN [--json] [--no_digests]",
                       "Shows what a checkpoint holds; of a run, its newest durable one.", &kInspectFlags, &inspect};
const Verb kVerify = {"verify", "verify CHECKPOINT|RUN [--json] [--expect_sha256 HEX]",
                      "Reads every byte of a checkpoint against its checksums; exit code 65 names what is bad.",
                      &kVerifyFlags, &verify};

}  // namespace lockstep::launcher
