#include "tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <algorithm>
#include <array>
#include <climits>
#include <fstream>
#include <queue>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include <pcre2.h>
#include <sentencepiece_processor.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep::data {
namespace {

// GPT-2's own pattern: words with one leading space, contractions, numbers, other signs, white space.
constexpr const char* kGpt2Pattern = R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct CodeTraits {
  using Handle = pcre2_code*;
  static Handle null() noexcept { return nullptr; }
  static void close(Handle code) noexcept { pcre2_code_free(code); }
};
struct MatchTraits {
  using Handle = pcre2_match_data*;
  static Handle null() noexcept { return nullptr; }
  static void close(Handle match) noexcept { pcre2_match_data_free(match); }
};

class ByteTokenizer : public Tokenizer {
 public:
  std::vector<uint32_t> encode(const std::string& text) const override {
    std::vector<uint32_t> ids(text.size());
    std::transform(text.begin(), text.end(), ids.begin(),
                   [](char letter) { return static_cast<unsigned char>(letter); });
    return ids;
  }
  int64_t vocab_size() const override { return 256; }
  int64_t end_of_text() const override { return -1; }
};

std::string decode_base64(const std::string& text) {
  static const std::array<int, 256> values = [] {
    std::array<int, 256> table{};
    table.fill(-1);
    const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; ++i) table[static_cast<unsigned char>(letters[i])] = i;
    return table;
  }();
  std::string bytes;
  uint32_t bits = 0;
  int have = 0;
  for (const unsigned char letter : text) {
    if (letter == '=') break;
    if (values[letter] < 0) throw CorruptData("'" + text + "' is not base64");
    bits = bits << 6 | static_cast<uint32_t>(values[letter]);
    if ((have += 6) >= 8) bytes.push_back(static_cast<char>(bits >> (have -= 8) & 0xff));
  }
  return bytes;
}

class Gpt2Tokenizer : public Tokenizer {
 public:
  explicit Gpt2Tokenizer(const std::string& path) {
    std::ifstream file(path);
    if (!file)
      throw ConfigError("--model=" + path + " cannot be read. Mend: name a tiktoken ranks file, e.g. gpt2.tiktoken");
    int64_t line = 0;
    for (std::string word; file >> word;) {
      uint32_t rank = 0;
      if (!(file >> rank))
        throw CorruptData("'" + path + "', line " + std::to_string(line + 1) +
                          ": a base64 word and its rank are expected");
      if (rank != line || !ranks_.emplace(decode_base64(word), rank).second)
        throw CorruptData("'" + path + "', line " + std::to_string(line + 1) +
                          ": ranks must count up from 0, each word once");
      ++line;
    }
    if (line < 256)
      throw CorruptData("'" + path + "' has " + std::to_string(line) + " ranks, fewer than there are bytes");
    for (int byte = 0; byte < 256; ++byte) {
      if (!ranks_.contains(std::string(1, static_cast<char>(byte))))
        throw CorruptData("'" + path + "' has no rank for byte " + std::to_string(byte));
    }
    int error = 0;
    PCRE2_SIZE place = 0;
    pattern_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kGpt2Pattern), PCRE2_ZERO_TERMINATED,
                                 PCRE2_UTF | PCRE2_UCP, &error, &place, nullptr));
    LOCKSTEP_CHECK(pattern_) << "pattern error " << error << " at " << place;
    pcre2_jit_compile(pattern_.get(), PCRE2_JIT_COMPLETE);  // without the compiler it is only slower
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(ranks_.size()) + 1; }
  int64_t end_of_text() const override { return static_cast<int64_t>(ranks_.size()); }

  std::vector<uint32_t> encode(const std::string& text) const override {
    std::vector<uint32_t> ids;
    const UniqueHandle<MatchTraits> match(pcre2_match_data_create_from_pattern(pattern_.get(), nullptr));
    for (size_t at = 0; at < text.size();) {
      // The first call checks all of the text; asking again at every word would make the whole quadratic.
      const int found = pcre2_match(pattern_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                    at == 0 ? 0 : PCRE2_NO_UTF_CHECK, match.get(), nullptr);
      if (found < 0)
        throw CorruptData("the text is not valid UTF-8 at byte " +
                          std::to_string(at == 0 ? pcre2_get_startchar(match.get()) : at) +
                          ". Mend: convert it, or use --tokenizer=bytes");
      const PCRE2_SIZE* place = pcre2_get_ovector_pointer(match.get());
      append_word(std::string_view(text).substr(place[0], place[1] - place[0]), ids);
      at = place[1];
    }
    return ids;
  }

 private:
  // Merges the neighbours of lowest rank, leftmost first, until none is left. The pieces are a linked list and the
  // pairs a heap, so a word of n bytes (a megabyte of one letter is legal text) costs n log n and not n squared.
  void append_word(std::string_view word, std::vector<uint32_t>& ids) const {
    if (const auto whole = ranks_.find(word); whole != ranks_.end()) {
      ids.push_back(whole->second);
      return;
    }
    const size_t n = word.size();
    std::vector<size_t> next(n + 1), previous(n + 1);  // starts of the pieces; n is the end
    std::vector<bool> alive(n + 1, true);
    for (size_t i = 0; i <= n; ++i) next[i] = i + 1, previous[i] = i - 1;
    using Pair = std::tuple<uint32_t, size_t, size_t>;  // rank, start, end: out of date when start or end moved since
    std::priority_queue<Pair, std::vector<Pair>, std::greater<>> pairs;
    const auto offer = [&](size_t start) {
      if (start >= n || next[start] >= n) return;
      const size_t end = next[next[start]];
      const auto pair = ranks_.find(word.substr(start, end - start));
      if (pair != ranks_.end()) pairs.emplace(pair->second, start, end);
    };
    for (size_t i = 0; i < n; ++i) offer(i);
    while (!pairs.empty()) {
      const auto [rank, start, end] = pairs.top();
      pairs.pop();
      if (!alive[start] || next[start] >= n || next[next[start]] != end) continue;
      alive[next[start]] = false;
      next[start] = end;
      previous[end] = start;
      offer(start);
      if (start > 0) offer(previous[start]);
    }
    for (size_t i = 0; i < n; i = next[i]) ids.push_back(ranks_.find(word.substr(i, next[i] - i))->second);
  }

  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view word) const { return std::hash<std::string_view>()(word); }
  };

  std::unordered_map<std::string, uint32_t, Hash, std::equal_to<>> ranks_;
  UniqueHandle<CodeTraits> pattern_;
};

class SentencePieceTokenizer : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(const std::string& path) {
    const auto status = processor_.Load(path);
    if (!status.ok())
      throw ConfigError("--model=" + path + " is no SentencePiece model: " + status.ToString() +
                        ". Mend: name a .model file");
  }
  std::vector<uint32_t> encode(const std::string& text) const override {
    std::vector<int> ids;
    const auto status = processor_.Encode(text, &ids);
    if (!status.ok()) throw CorruptData("SentencePiece: " + status.ToString());
    return {ids.begin(), ids.end()};
  }
  int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  int64_t end_of_text() const override { return processor_.eos_id(); }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }
std::unique_ptr<Tokenizer> make_gpt2_tokenizer(const std::string& ranks_file) {
  return std::make_unique<Gpt2Tokenizer>(ranks_file);
}
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_file) {
  return std::make_unique<SentencePieceTokenizer>(model_file);
}

}  // namespace lockstep::data
