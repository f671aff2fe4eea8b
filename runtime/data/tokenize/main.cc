// tokenize: turns text files into token files that training reads. One document a file, in the order given.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <optional>
#include <span>

#include <unistd.h>

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

// A token file under a temporary name, renamed when all outputs are whole: a file with the final name is never half
// written, and what it replaces stays until then. Dropped without commit() it leaves nothing.
class TokenWriter {
 public:
  TokenWriter(std::string path, std::span<const uint32_t> tokens, bool wide) : TokenWriter(std::move(path)) {
    real_fs().remove_file(temporary_);
    const auto file = real_fs().create_exclusive(temporary_, 0644);
    const size_t item = wide ? 4 : 2;
    file->allocate(kTokenHeaderBytes + tokens.size() * item);
    std::vector<std::byte> bytes(kTokenHeaderBytes);
    const int32_t header[3] = {wide ? kTokenMagicU32 : kTokenMagicU16, wide ? 7 : 1,
                               static_cast<int32_t>(tokens.size())};
    std::memcpy(bytes.data(), header, sizeof(header));
    file->write_at(0, bytes);
    for (size_t done = 0; done < tokens.size();) {
      const size_t n = std::min<size_t>(tokens.size() - done, 1 << 20);
      bytes.resize(n * item);
      for (size_t i = 0; i < n; ++i) std::memcpy(bytes.data() + i * item, &tokens[done + i], item);  // little-endian
      file->write_at(kTokenHeaderBytes + done * item, bytes);
      done += n;
    }
    file->sync();
    file->close();
    summary_ = path_ + ": " + std::to_string(tokens.size()) + " tokens of " + std::to_string(item) + " bytes\n";
  }
  TokenWriter(const TokenWriter&) = delete;
  TokenWriter& operator=(const TokenWriter&) = delete;
  ~TokenWriter() {
    if (!committed_) std::remove(temporary_.c_str());
  }

  void commit() {
    std::error_code error;
    std::filesystem::rename(temporary_, path_, error);
    if (error) throw IoError("renaming to the final name of", temporary_, error.value());
    committed_ = true;
    const auto folder = std::filesystem::path(path_).parent_path();
    real_fs().sync_directory(folder.empty() ? "." : folder.string());
    std::cout << summary_;
  }

 private:
  // The other constructor goes through this one, so that the destructor also runs when a write fails in it.
  explicit TokenWriter(std::string path) : path_(std::move(path)), temporary_(path_ + ".tmp") {}

  std::string path_, temporary_, summary_;
  bool committed_ = false;
};

std::string read_document(const std::string& path) {
  if (!std::filesystem::is_regular_file(path))
    throw ConfigError("'" + path + "' is not there or no regular file. Mend: name text files");
  std::string text = read_text(real_fs(), std::filesystem::canonical(path).string(), uint64_t{4} << 30);
  if (text.empty()) throw ConfigError("'" + path + "' is empty. Mend: leave it out");
  return text;
}

int tokenize(const std::vector<std::string>& files) {
  if (files.empty()) throw ConfigError("no text files are named. Mend: tokenize --output PREFIX FILES…");
  if (FLAGS_output.empty()) throw ConfigError("--output is missing: the prefix of the files to write");
  if (!(FLAGS_validation_fraction >= 0 && FLAGS_validation_fraction < 1))
    throw ConfigError("--validation_fraction must be in [0, 1)");
  const auto tokenizer = make_tokenizer();
  std::vector<uint32_t> tokens;
  const bool show_progress = ::isatty(STDERR_FILENO) != 0;
  size_t done = 0;
  for (const std::string& path : files) {
    const std::string text = read_document(path);
    if (show_progress) std::cerr << "\r" << ++done << "/" << files.size() << " files" << std::flush;
    if (tokenizer->end_of_text() >= 0)
      tokens.push_back(static_cast<uint32_t>(tokenizer->end_of_text()));  // a document begins with it, as in llm.c
    try {
      const auto ids = tokenizer->encode(text);
      tokens.insert(tokens.end(), ids.begin(), ids.end());
    } catch (const CorruptData& error) {
      throw CorruptData("'" + path + "': " + error.what());
    }
  }
  if (show_progress) std::cerr << "\n";
  if (tokens.size() > INT32_MAX)
    throw ConfigError(std::to_string(tokens.size()) +
                      " tokens do not fit one file. Mend: run tokenize on parts of the text");
  const std::string folder = std::filesystem::path(FLAGS_output + "train.bin").parent_path().string();
  if (!folder.empty()) make_directories(real_fs(), folder, 0755);
  const bool wide = tokenizer->vocab_size() > 65536;
  const auto held_out = static_cast<size_t>(static_cast<double>(tokens.size()) * FLAGS_validation_fraction);
  const std::span<const uint32_t> all(tokens);
  TokenWriter train(FLAGS_output + "train.bin", all.first(tokens.size() - held_out), wide);
  std::optional<TokenWriter> validation;
  if (held_out > 0) validation.emplace(FLAGS_output + "validation.bin", all.last(held_out), wide);
  train.commit();
  if (validation) validation->commit();
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
