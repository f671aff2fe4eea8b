// The bytes of an event file, parsed back.
#include <cstring>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <protozero/pbf_reader.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/metrics/run_log.h>

#include "temp_dir.h"

namespace lockstep::metrics {
namespace {

using testing::ElementsAre;
using testing::MatchesRegex;
using testing::Pair;

// CRC32C bit by bit, unlike the library the writer uses. Source: RFC 3720, B.4.
uint32_t masked_crc(const std::string& data) {
  uint32_t crc = ~0u;
  for (const char byte : data) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  crc = ~crc;
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

struct Event {
  double wall_time = 0;
  int64_t step = 0, session_status = 0;
  std::string file_version;
  std::vector<std::pair<std::string, float>> values;
};

Event parse_event(const std::string& data) {
  Event event;
  protozero::pbf_reader reader(data);
  while (reader.next()) {
    switch (reader.tag()) {
      case 1:
        event.wall_time = reader.get_double();
        break;
      case 2:
        event.step = reader.get_int64();
        break;
      case 3:
        event.file_version = reader.get_string();
        break;
      case 5: {
        protozero::pbf_reader summary = reader.get_message();
        while (summary.next(1)) {
          protozero::pbf_reader value = summary.get_message();
          std::pair<std::string, float> pair;
          while (value.next())
            value.tag() == 1 ? void(pair.first = value.get_string()) : void(pair.second = value.get_float());
          event.values.push_back(pair);
        }
        break;
      }
      case 7: {
        protozero::pbf_reader log = reader.get_message();
        while (log.next(1)) event.session_status = log.get_enum();
        break;
      }
      default:
        ADD_FAILURE() << "field " << reader.tag();
        reader.skip();
    }
  }
  return event;
}

std::vector<Event> events_of(const std::string& path) {
  const std::string text = read_text(real_fs(), path, 1 << 20);
  std::vector<Event> events;
  for (size_t at = 0; at < text.size();) {
    uint64_t length = 0;
    uint32_t length_crc = 0, data_crc = 0;
    std::memcpy(&length, text.data() + at, 8);
    std::memcpy(&length_crc, text.data() + at + 8, 4);
    EXPECT_EQ(length_crc, masked_crc(text.substr(at, 8)));
    const std::string data = text.substr(at + 12, length);
    std::memcpy(&data_crc, text.data() + at + 12 + length, 4);
    EXPECT_EQ(data_crc, masked_crc(data));
    events.push_back(parse_event(data));
    at += 16 + length;
  }
  return events;
}

TEST(TensorBoardTest, TheReferenceCrcIsTheStandardOne) {
  const uint32_t crc = 0xe3069283u;  // of "123456789", RFC 3720
  EXPECT_EQ(masked_crc("123456789"), ((crc >> 15) | (crc << 17)) + 0xa282ead8u);
}

TEST(TensorBoardTest, RecordsCarryStepsTagsAndValues) {
  const TempDir dir;
  {
    TensorBoardWriter writer(dir.path(), 0);
    writer.scalars(1, {{"train/loss", 2.5}, {"train/grad_norm", 0.125}});
    writer.scalars(int64_t{1} << 40, {{"train/loss", 1.0 / 3}});
  }
  const auto names = real_fs().list_directory(dir.path());
  ASSERT_EQ(names.size(), 1u);
  EXPECT_THAT(names[0], MatchesRegex("events\\.out\\.tfevents\\.[0-9]{10}\\..+\\.[0-9]+\\.[0-9]+"));
  const auto events = events_of(dir / names[0]);
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[0].file_version, "brain.Event:2");
  EXPECT_GT(events[0].wall_time, 1.6e9);
  EXPECT_EQ(events[1].session_status, 1);
  EXPECT_EQ(events[1].step, 1);
  EXPECT_EQ(events[2].step, 1);
  EXPECT_THAT(events[2].values, ElementsAre(Pair("train/loss", 2.5f), Pair("train/grad_norm", 0.125f)));
  EXPECT_EQ(events[3].step, int64_t{1} << 40);
  EXPECT_THAT(events[3].values, ElementsAre(Pair("train/loss", 1.0f / 3)));
}

TEST(TensorBoardTest, AResumeTellsReadersFromWhereOnToDropAndHasAFileOfItsOwn) {
  const TempDir dir;
  const TensorBoardWriter first(dir.path(), 0), second(dir.path(), 120);
  const auto names = real_fs().list_directory(dir.path());
  ASSERT_EQ(names.size(), 2u);
  const auto events = events_of(dir / names[1]);
  ASSERT_EQ(events.size(), 2u) << "written at once, not at the first flush";
  EXPECT_EQ(events[1].session_status, 1);
  EXPECT_EQ(events[1].step, 121);
}

TEST(TensorBoardTest, AFolderThatIsNotThereIsSaid) { EXPECT_THROW(TensorBoardWriter("/absent/folder", 0), IoError); }

}  // namespace
}  // namespace lockstep::metrics
