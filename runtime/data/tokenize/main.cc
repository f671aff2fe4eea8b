// tokenize: turns text files into token files that training reads. One document a file, in the order given.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/data/token_format.h>

#include "tokenizer.h"

DEFINE_string(tokenizer, "bytes", "bytes (256 ids, no model) | gpt2 (byte-pair encoding) | sentencepiece");
DEFINE_string(model, "", "gpt2: a tiktoken ranks file; sentencepiece: a .model file");
DEFINE_string(output, "",
              "prefix of the files written: PREFIXtrain.bin and, with --validation_fraction, PREFIXvalidation.bin; a "
              "folder ends with /");
DEFINE_double(validation_fraction, 0, "share of the tokens, the last ones, that is held out");

namespace lockstep::data {
namespace {

std::unique_ptr<Tokenizer> make_tokenizer() {
  if (FLAGS_tokenizer == "bytes") return make_byte_tokenizer();
  if (FLAGS_tokenizer != "gpt2" && FLAGS_tokenizer != "sentencepiece")
    throw ConfigError("--tokenizer=" + FLAGS_tokenizer + " is neither bytes, gpt2 nor sentencepiece");
  if (FLAGS_model.empty()) throw ConfigError("--tokenizer=" + FLAGS_tokenizer + " needs --model");
  return FLAGS_tokenizer == "gpt2" ? make_gpt2_tokenizer(FLAGS_model) : make_sentencepiece_tokenizer(FLAGS_model);
}

// Written under another name, synced, then renamed: a file with the final name is whole.
void write_tokens(const std::string& path, std::span<const uint32_t> tokens, bool wide) {
  const std::string temporary = path + ".tmp";
  real_fs().remove_file(temporary);
  std::vector<std::byte> bytes(kTokenHeaderBytes + tokens.size() * (wide ? 4 : 2));
  const int32_t header[3] = {wide ? kTokenMagicU32 : kTokenMagicU16, wide ? 7 : 1, static_cast<int32_t>(tokens.size())};
  std::memcpy(bytes.data(), header, sizeof(header));
  for (size_t i = 0; i < tokens.size(); ++i)
    std::memcpy(bytes.data() + kTokenHeaderBytes + i * (wide ? 4 : 2), &tokens[i], wide ? 4 : 2);  // little-endian
  write_durable(real_fs(), temporary, std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), 0644);
  real_fs().remove_file(path);
  real_fs().rename_exclusive(temporary, path);
  std::cout << path << ": " << tokens.size() << " tokens of " << (wide ? 4 : 2) << " bytes\n";
}

int tokenize(const std::vector<std::string>& files) {
  if (files.empty()) throw ConfigError("no text files are named. Mend: tokenize --output PREFIX FILES…");
  if (FLAGS_output.empty()) throw ConfigError("--output is missing: the prefix of the files to write");
  if (!(FLAGS_validation_fraction >= 0 && FLAGS_validation_fraction < 1))
    throw ConfigError("--validation_fraction must be in [0, 1)");
  const auto tokenizer = make_tokenizer();
  std::vector<uint32_t> tokens;
  for (const std::string& path : files) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (!file || !(text << file.rdbuf()))
      throw ConfigError("'" + path + "' cannot be read or is empty. Mend: check the path");
    if (tokenizer->end_of_text() >= 0)
      tokens.push_back(static_cast<uint32_t>(tokenizer->end_of_text()));  // a document begins with it, as in llm.c
    const auto ids = tokenizer->encode(text.str());
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }
  if (tokens.size() > INT32_MAX)
    throw ConfigError(std::to_string(tokens.size()) +
                      " tokens do not fit one file. Mend: run tokenize on parts of the text");
  const std::string folder = std::filesystem::path(FLAGS_output + "train.bin").parent_path().string();
  if (!folder.empty()) make_directories(real_fs(), folder, 0755);
  const bool wide = tokenizer->vocab_size() > 65536;
  const auto held_out = static_cast<size_t>(static_cast<double>(tokens.size()) * FLAGS_validation_fraction);
  const std::span<const uint32_t> all(tokens);
  write_tokens(FLAGS_output + "train.bin", all.first(tokens.size() - held_out), wide);
  if (held_out > 0) write_tokens(FLAGS_output + "validation.bin", all.last(held_out), wide);
  std::cout << "train with --vocab_size=" << tokenizer->vocab_size() << "\n";
  return 0;
}

}  // namespace
}  // namespace lockstep::data

int main(int argc, char** argv) {
  try {
    const auto files = lockstep::parse_command_line(
        argc, argv, "turns text files into token files: tokenize --output PREFIX FILES…", {{"Flags", __FILE__}});
    return lockstep::data::tokenize(files);
  } catch (...) {
    const auto failure = lockstep::describe_current_exception();
    std::cerr << "tokenize: " << failure.message << "\n";
    return static_cast<int>(failure.code);
  }
}
