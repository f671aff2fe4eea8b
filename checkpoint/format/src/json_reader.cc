#include "json_reader.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>

#include <lockstep/base/error.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::format {
namespace {

constexpr size_t kShownBytes = 80;                       // of a text in a message; it may have megabytes
constexpr size_t kBlockOverhead = 16, kLeastBlock = 32;  // of malloc

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }
bool is_high_surrogate(unsigned code) { return code >= 0xd800 && code < 0xdc00; }
bool is_low_surrogate(unsigned code) { return code >= 0xdc00 && code < 0xe000; }

unsigned hex4(std::string_view digits) {
  unsigned code = 0;
  std::from_chars(digits.data(), digits.data() + 4, code, 16);
  return code;
}

void append_utf8(unsigned code, std::string& text) {
  const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
  if (code < 0x80) {
    text += static_cast<char>(code);
  } else if (code < 0x800) {
    text += static_cast<char>(0xc0 | code >> 6), tail(0);
  } else if (code < 0x10000) {
    text += static_cast<char>(0xe0 | code >> 12), tail(6), tail(0);
  } else {
    text += static_cast<char>(0xf0 | code >> 18), tail(12), tail(6), tail(0);
  }
}

}  // namespace

std::string shown(std::string_view text) {
  std::string start(text.substr(0, kShownBytes));
  std::replace_if(start.begin(), start.end(), is_control, '?');
  return start + (text.size() > kShownBytes ? "..." : "");
}

JsonReader::JsonReader(std::string_view text, std::string what)
    : text_(text), what_(std::move(what)), budget_(std::min(text.size(), kBudgetBytes) + kBudgetBytes) {
  frames_.reserve(kMaxDepth);  // so that none of them moves
}

void JsonReader::enter_object() { enter('{', "is no object"); }

void JsonReader::enter_array() { enter('[', "is no list"); }

void JsonReader::enter(char open, const char* otherwise) {
  skip_space();
  if (peek() != open) fail_type(otherwise);
  if (frames_.size() == kMaxDepth) fail("nests JSON deeper than " + std::to_string(kMaxDepth));
  ++at_;
  frames_.push_back({.keys_begin = keys_.size()});
}

// Goes to the next member or element. What the caller did not read is skipped first.
bool JsonReader::next(char close) {
  Frame& frame = frames_.back();
  if (at_ == frame.value_at) skip_value();
  skip_space();
  if (peek() == close) {
    ++at_;
    leave();
    return false;
  }
  if (!frame.is_first) {
    expect(',');
    skip_space();
  }
  frame.is_first = false;
  frame.value_at = at_;
  return true;
}

bool JsonReader::next_element() { return next(']'); }

std::optional<std::string_view> JsonReader::next_key() {
  if (!next('}')) return std::nullopt;
  Frame& frame = frames_.back();
  bool is_escaped = false;
  const std::string_view raw = scan_string(is_escaped);
  frame.key = is_escaped ? unescaped(raw) : raw;
  if (std::any_of(frame.key.begin(), frame.key.end(), is_control)) fail("has a key with control characters");
  if (keys_.size() == most_keys_) {
    charge(2 * sizeof(std::string_view));  // a vector that grows holds old and new at once
    ++most_keys_;
  }
  keys_.push_back(frame.key);
  skip_space();
  expect(':');
  skip_space();
  frame.value_at = at_;
  return frame.key;
}

// Equal keys are found at the end, by sorting: a hostile object has millions.
void JsonReader::leave() {
  const auto begin = keys_.begin() + static_cast<std::ptrdiff_t>(frames_.back().keys_begin);
  std::sort(begin, keys_.end());
  const auto twice = std::adjacent_find(begin, keys_.end());
  frames_.pop_back();
  if (twice != keys_.end()) fail("has the key '" + shown(*twice) + "' twice");
  keys_.erase(begin, keys_.end());
}

std::string_view JsonReader::read_text() {
  skip_space();
  if (peek() != '"') fail_type("is no text");
  bool is_escaped = false;
  const std::string_view raw = scan_string(is_escaped);
  return is_escaped ? unescaped(raw) : raw;
}

int64_t JsonReader::read_integer() {
  skip_space();
  if (peek() != '-' && !is_digit(peek())) fail_type("is no integer");
  bool is_integer = true;
  const std::string_view digits = scan_number(is_integer);
  int64_t value = 0;
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (!is_integer || parsed.ec != std::errc()) fail("is no integer of 64 bits");
  return value;
}

int64_t JsonReader::read_count() {
  const int64_t value = read_integer();
  if (value < 0) fail("is negative");
  return value;
}

std::vector<int64_t> JsonReader::read_counts(size_t most) {
  std::array<int64_t, kMaxRank> counts{};
  size_t size = 0;
  most = std::min(most, counts.size());
  enter_array();
  while (next_element()) {
    if (size == most) fail("has more than " + std::to_string(most) + " numbers");
    if (!is_digit(peek())) fail_type("is not made of counts");
    bool is_integer = true;
    const std::string_view digits = scan_number(is_integer);
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), counts[size++]);
    if (!is_integer || parsed.ec != std::errc()) fail("is not made of counts");
  }
  if (size > 0) charge_block(size * sizeof(int64_t));
  return {counts.begin(), counts.begin() + static_cast<std::ptrdiff_t>(size)};
}

std::string_view JsonReader::skip_value() {
  skip_space();
  const size_t begin = at_;
  bool ignored = false;
  const auto word = [&](std::string_view name) {
    if (text_.substr(at_, name.size()) != name) fail_syntax("no value starts like this");
    at_ += name.size();
  };
  switch (peek()) {
    case '{':
      enter_object();
      while (next_key()) skip_value();
      break;
    case '[':
      enter_array();
      while (next_element()) skip_value();
      break;
    case '"':
      scan_string(ignored);
      break;
    case 't':
      word("true");
      break;
    case 'f':
      word("false");
      break;
    case 'n':
      word("null");
      break;
    default:
      scan_number(ignored);
  }
  return text_.substr(begin, at_ - begin);
}

size_t JsonReader::count_elements() {
  const size_t begin = at_;
  size_t count = 0;
  enter_array();
  for (; next_element(); ++count) skip_value();
  at_ = begin;
  return count;
}

void JsonReader::finish() {
  skip_space();
  if (at_ != text_.size()) fail_syntax("something follows its end");
}

void JsonReader::charge(size_t bytes) {
  if (bytes > budget_) fail("describes more than fits into memory of its own size and 64 MiB");
  budget_ -= bytes;
}

void JsonReader::charge_block(size_t bytes) { charge(std::max(bytes + kBlockOverhead, kLeastBlock)); }

void JsonReader::require(bool is_there, const char* key) const {
  if (!is_there) fail(std::string("lacks '") + key + "'");
}

void JsonReader::fail(const std::string& problem) const {
  std::string place;
  for (const Frame& frame : frames_) {
    if (!frame.key.empty()) place += (place.empty() ? "" : "/") + shown(frame.key);
  }
  throw CorruptData(what_ + ":" + (place.empty() ? "" : " '" + place + "'") + " " + problem);
}

void JsonReader::fail_type(const char* problem) const {
  if (at_ == text_.size()) fail_syntax("it ends too early");
  fail(problem);
}

void JsonReader::fail_syntax(const char* problem) const {
  throw CorruptData(what_ + " is not valid JSON at byte " + std::to_string(at_) + ": " + problem);
}

void JsonReader::expect(char c) {
  if (peek() != c) {
    const std::string problem = std::string("'") + c + "' is missing";
    fail_syntax(problem.c_str());
  }
  ++at_;
}

void JsonReader::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
    ++at_;
}

// Checks a string whole. @return what is between the quotes.
std::string_view JsonReader::scan_string(bool& is_escaped) {
  expect('"');
  const size_t begin = at_;
  for (;;) {
    if (at_ == text_.size()) fail_syntax("a text does not end");
    const auto byte = static_cast<unsigned char>(text_[at_]);
    if (byte == '"') return text_.substr(begin, at_++ - begin);
    if (byte < 0x20) fail_syntax("a control character in a text");
    if (byte == '\\') {
      is_escaped = true;
      scan_escape();
    } else if (byte < 0x80) {
      ++at_;
    } else {
      scan_utf8();
    }
  }
}

void JsonReader::scan_escape() {
  ++at_;
  const char kind = peek();
  if (kind == '\0' || std::string_view("\"\\/bfnrtu").find(kind) == std::string_view::npos)
    fail_syntax("an unknown escape");
  ++at_;
  if (kind != 'u') return;
  const unsigned code = scan_hex4();
  if (is_low_surrogate(code)) fail_syntax("half a surrogate pair");
  if (!is_high_surrogate(code)) return;
  if (text_.substr(at_, 2) != "\\u") fail_syntax("half a surrogate pair");
  at_ += 2;
  if (!is_low_surrogate(scan_hex4())) fail_syntax("half a surrogate pair");
}

unsigned JsonReader::scan_hex4() {
  const std::string_view digits = text_.substr(at_, 4);
  if (digits.size() < 4 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos)
    fail_syntax("four hex digits are missing");
  at_ += 4;
  return hex4(digits);
}

// One character of several bytes. Source: The Unicode Standard, table 3-7: no overlong forms, no surrogates.
void JsonReader::scan_utf8() {
  const auto byte = [&](size_t i) { return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0U; };
  const unsigned first = byte(0), second = byte(1);
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  unsigned low = 0x80, high = 0xbf;
  if (first == 0xe0) low = 0xa0;
  if (first == 0xed) high = 0x9f;
  if (first == 0xf0) low = 0x90;
  if (first == 0xf4) high = 0x8f;
  bool is_good = first >= 0xc2 && first <= 0xf4 && second >= low && second <= high;
  for (size_t i = 2; i < length; ++i) is_good = is_good && byte(i) >= 0x80 && byte(i) <= 0xbf;
  if (!is_good) fail_syntax("bytes that are no UTF-8");
  at_ += length;
}

std::string_view JsonReader::scan_number(bool& is_integer) {
  const size_t begin = at_;
  const auto digits = [&] {
    if (!is_digit(peek())) fail_syntax("a value is missing or no number");
    while (is_digit(peek())) ++at_;
  };
  if (peek() == '-') ++at_;
  if (peek() == '0') {
    ++at_;
  } else {
    digits();
  }
  is_integer = peek() != '.' && peek() != 'e' && peek() != 'E';
  if (peek() == '.') {
    ++at_;
    digits();
  }
  if (peek() == 'e' || peek() == 'E') {
    ++at_;
    if (peek() == '+' || peek() == '-') ++at_;
    digits();
  }
  return text_.substr(begin, at_ - begin);
}

// `raw` has been checked by scan_string().
std::string_view JsonReader::unescaped(std::string_view raw) {
  charge_block(sizeof(std::string) + raw.size());
  std::string& text = unescaped_.emplace_back();
  text.reserve(raw.size());
  for (size_t i = 0; i < raw.size(); ++i) {
    if (raw[i] != '\\') {
      text += raw[i];
      continue;
    }
    constexpr std::string_view kKinds = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (const size_t kind = kKinds.find(raw[++i]); kind != std::string_view::npos) {
      text += kMeanings[kind];
      continue;
    }
    unsigned code = hex4(raw.substr(i + 1));
    i += 4;
    if (is_high_surrogate(code)) {
      code = 0x10000 + ((code - 0xd800) << 10) + (hex4(raw.substr(i + 3)) - 0xdc00);
      i += 6;
    }
    append_utf8(code, text);
  }
  return text;
}

}  // namespace lockstep::format
