#include <cerrno>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>

#include "temp_dir.h"

namespace lockstep {
namespace {

using testing::ElementsAre;

std::span<const std::byte> bytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

Fault nothing(const std::string&, const std::string&, int64_t) { return {}; }

TEST(FaultFsTest, ANameShowsLateAsOftenAsAsked) {
  const TempDir dir;
  FaultFs fs(real_fs(), nothing);
  write_durable(fs, dir / "x", "text");
  EXPECT_FALSE(fs.shows_late(dir.path()));
  fs.show_late(dir / "x", 3);
  EXPECT_TRUE(fs.shows_late(dir.path()));
  EXPECT_FALSE(fs.exists(dir / "x"));
  EXPECT_THROW(fs.open_read(dir / "x"), IoError);
  EXPECT_THROW(fs.open_folder(dir.path())->open_read("x"), IoError);
  EXPECT_EQ(read_text(fs, dir / "x", 10), "text");
}

// One of everything, in this order.
const std::vector<std::string> kKinds = {"mkdir", "open", "allocate",       "write",  "sync",   "close", "open",
                                         "read",  "list", "sync_directory", "rename", "unlink", "open",  "rmdir"};

void use_everything(Fs& fs, const TempDir& dir) {
  fs.make_directory(dir / "d", 0700);
  const auto file = fs.create_exclusive(dir / "x", 0600);
  file->allocate(4);
  file->write_at(0, bytes("text"));
  file->sync();
  file->close();
  std::vector<std::byte> buffer(2);
  fs.open_read(dir / "x")->read_at(1, buffer);
  fs.list_directory(dir.path());
  fs.sync_directory(dir.path());
  fs.rename_exclusive(dir / "x", dir / "y");
  fs.remove_file(dir / "y");
  fs.open_append(dir / "z", 0600);
  fs.remove_directory(dir / "d");
}

TEST(FaultFsTest, WithoutFaultsItIsTheRealOneAndCounts) {
  const TempDir dir;
  FaultFs fs(real_fs(), nothing);
  use_everything(fs, dir);
  EXPECT_EQ(fs.calls(), static_cast<int64_t>(kKinds.size()));
  EXPECT_FALSE(real_fs().exists(dir / "d"));
  EXPECT_TRUE(real_fs().exists(dir / "z"));
  std::vector<std::string> kinds;
  for (const std::string& line : fs.log()) kinds.push_back(line.substr(0, line.find(' ')));
  EXPECT_EQ(kinds, kKinds);
  EXPECT_EQ(fs.log()[3], "write " + dir / "x" + " 0 4");
}

TEST(FaultFsTest, EveryCallCanBeMadeToFail) {
  for (int64_t k = 0; k < static_cast<int64_t>(kKinds.size()); ++k) {
    for (const int64_t short_bytes : {-1, 1}) {  // bytes mean something to a write only; the rest fails all the same
      const TempDir dir;
      FaultFs fs(real_fs(), [&](const std::string& kind, const std::string&, int64_t call) {
        EXPECT_EQ(kind, kKinds[static_cast<size_t>(call)]);
        return call == k ? Fault{.error_number = EDQUOT, .short_bytes = short_bytes} : Fault{};
      });
      int error_number = 0;
      try {
        use_everything(fs, dir);
      } catch (const IoError& error) {
        error_number = error.error_number();
      }
      EXPECT_EQ(error_number, EDQUOT) << kKinds[static_cast<size_t>(k)];
      EXPECT_EQ(fs.calls(), k + 1) << "nothing after the failure";
    }
  }
}

TEST(FaultFsTest, ATornWriteLeavesItsFirstBytes) {
  const TempDir dir;
  FaultFs fs(real_fs(), [](const std::string& kind, const std::string&, int64_t) {
    return kind == "write" ? Fault{.error_number = EIO, .short_bytes = 3} : Fault{};
  });
  const auto file = fs.create_exclusive(dir / "x", 0600);
  EXPECT_THROW(file->write_at(0, bytes("hello")), IoError);
  EXPECT_EQ(read_text(real_fs(), dir / "x", 9), "hel");
}

TEST(FaultFsTest, ADroppedCallReportsSuccessAndDoesNothing) {
  const TempDir dir;
  FaultFs fs(real_fs(), [](const std::string& kind, const std::string&, int64_t) {
    return Fault{.drop = kind == "write" || kind == "rename" || kind == "unlink"};
  });
  const auto file = fs.create_exclusive(dir / "x", 0600);
  file->write_at(0, bytes("hello"));
  EXPECT_EQ(file->size(), 0u);
  fs.rename_exclusive(dir / "x", dir / "y");
  fs.remove_file(dir / "x");
  EXPECT_THAT(real_fs().list_directory(dir.path()), ElementsAre("x"));
}

}  // namespace
}  // namespace lockstep
