#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace lockstep::data {

/// Text to token ids.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::vector<uint32_t> encode(const std::string& text) const = 0;
  virtual int64_t vocab_size() const = 0;
  /// The id put between documents; -1: none (bytes have no spare id, and text files read on well).
  virtual int64_t end_of_text() const = 0;
};

/// Ids are the bytes: 256 of them, no model file.
std::unique_ptr<Tokenizer> make_byte_tokenizer();

/// GPT-2's byte-pair encoding. @param ranks_file tiktoken's "base64 rank" lines; end of text is the id after the last.
/// Source: Radford et al. 2019; Sennrich, Haddow, Birch, arXiv:1508.07909. @throws ConfigError, CorruptData.
std::unique_ptr<Tokenizer> make_gpt2_tokenizer(const std::string& ranks_file);

/// A SentencePiece .model file, as Llama and Mistral have. Source: Kudo & Richardson, arXiv:1808.06226.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_file);

}  // namespace lockstep::data
