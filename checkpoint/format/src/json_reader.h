#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep::format {

/// A text of a file as a message may show it: cut to 80 bytes, control characters replaced, because it ends on
/// terminals.
std::string shown(std::string_view text);

/// A cursor over JSON that somebody may have made to hurt. The caller pulls values straight into what they mean; no
/// tree is built, because a tree takes up to fifty times the bytes of its text.
///
///     json.enter_object();
///     while (const auto key = json.next_key()) {
///       if (*key == "step") step = json.read_count();  // what is not read is skipped
///     }
///     json.finish();
///
/// Refused on the way, in skipped values too: what RFC 8259 does not allow, bytes that are no UTF-8, containers nested
/// deeper than kMaxDepth, keys that repeat in one object or hold control characters. All errors are CorruptData and
/// name the file and the keys on the way to the value.
///
/// Memory: the reader's own, and what callers charge() for what they keep, is at most the text's size + 64 MiB, 128 MiB
/// in all; a text that wants more is refused.
class JsonReader {
 public:
  static constexpr size_t kMaxDepth = 32;
  static constexpr size_t kBudgetBytes = size_t{64} << 20;

  /// @param text must outlive the reader and what it returns. @param what names it in errors.
  JsonReader(std::string_view text, std::string what);

  void enter_object();
  std::optional<std::string_view> next_key();  ///< nullopt: the object has ended
  void enter_array();
  bool next_element();  ///< false: the array has ended

  std::string_view read_text();
  int64_t read_integer();
  int64_t read_count();                           ///< an integer >= 0
  std::vector<int64_t> read_counts(size_t most);  ///< a list of at most `most` counts
  std::string_view skip_value();                  ///< @return its own text
  size_t count_elements();                        ///< of the array that comes next, which is still to be read
  void finish();                                  ///< nothing but white space may follow

  /// To be called before memory of this size is taken for what the text says; heap blocks have a cost of their own.
  void charge(size_t bytes);
  void charge_block(size_t bytes);
  void refund(size_t bytes) { budget_ += bytes; }

  void require(bool is_there, const char* key) const;
  [[noreturn]] void fail(const std::string& problem) const;

 private:
  struct Frame {  // a container we are inside of
    bool is_first = true;
    size_t keys_begin = 0;  // its keys in keys_
    std::string_view key;   // the one whose value is next or being read
    size_t value_at = std::string_view::npos;
  };

  void enter(char open, const char* otherwise);
  bool next(char close);
  void leave();
  std::string_view scan_string(bool& is_escaped);
  void scan_escape();
  unsigned scan_hex4();
  void scan_utf8();
  std::string_view scan_number(bool& is_integer);
  std::string_view unescaped(std::string_view raw);
  void skip_space();
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void expect(char c);
  [[noreturn]] void fail_type(const char* problem) const;
  [[noreturn]] void fail_syntax(const char* problem) const;

  std::string_view text_;
  std::string what_;
  size_t at_ = 0;
  size_t budget_;
  std::vector<Frame> frames_;
  std::vector<std::string_view> keys_;  // of all objects we are inside of
  size_t most_keys_ = 0;                // for which memory is charged
  std::deque<std::string> unescaped_;   // texts that differ from their bytes; a deque does not move them
};

}  // namespace lockstep::format
