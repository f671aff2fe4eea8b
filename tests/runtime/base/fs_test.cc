// The real file system, with system calls that this binary takes over to make them short, interrupted or unknown.
#undef _FORTIFY_SOURCE  // its inline pread would be a second definition
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "temp_dir.h"

namespace {

std::atomic<bool> g_hostile_io{false}, g_no_exclusive_rename{false};
std::atomic<int> g_io_calls{0};

// Every other call is interrupted, and no call moves more than 3 bytes.
bool interrupted() {
  if (!g_hostile_io || g_io_calls++ % 2 != 0) return false;
  errno = EINTR;
  return true;
}

size_t shortened(size_t n) { return g_hostile_io && n > 3 ? 3 : n; }

}  // namespace

extern "C" {
ssize_t pwrite(int fd, const void* data, size_t n, off_t offset) {
  return interrupted() ? -1 : syscall(SYS_pwrite64, fd, data, shortened(n), offset);
}
ssize_t pread(int fd, void* data, size_t n, off_t offset) {
  return interrupted() ? -1 : syscall(SYS_pread64, fd, data, shortened(n), offset);
}
int fdatasync(int fd) { return interrupted() ? -1 : static_cast<int>(syscall(SYS_fdatasync, fd)); }
int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) noexcept {
  if (g_no_exclusive_rename) return errno = EINVAL, -1;
  return static_cast<int>(syscall(SYS_renameat2, from_dir, from, to_dir, to, flags));
}
}

namespace lockstep {
namespace {

using testing::ElementsAre;

std::span<const std::byte> bytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

template <typename Body>
int error_of(Body body) {
  try {
    body();
  } catch (const IoError& error) {
    return error.error_number();
  }
  return 0;
}

unsigned mode_of(const std::string& path) {
  struct stat status {};
  EXPECT_EQ(::stat(path.c_str(), &status), 0) << path;
  return status.st_mode & 0777u;
}

class FsTest : public testing::Test {
 protected:
  void TearDown() override { g_hostile_io = g_no_exclusive_rename = false; }

  void write(const std::string& name, const std::string& text) { write_durable(fs_, dir_ / name, text); }
  std::string read(const std::string& name) { return read_text(fs_, dir_ / name, 1 << 20); }

  Fs& fs_ = real_fs();
  TempDir dir_;
};

TEST_F(FsTest, WhatIsWrittenIsReadBack) {
  const auto file = fs_.create_exclusive(dir_ / "x");
  file->allocate(11);
  EXPECT_EQ(file->size(), 11u);
  file->write_at(6, bytes("world"));
  file->write_at(0, bytes("hello "));
  file->write_at(0, {});
  file->sync();
  file->close();
  EXPECT_EQ(read("x"), "hello world");
  EXPECT_EQ(mode_of(dir_ / "x"), 0600u);
}

TEST_F(FsTest, SignalsAndShortTransfersAreBorne) {
  g_hostile_io = true;
  const std::string text(1001, 'q');
  write("x", text);
  EXPECT_EQ(read("x"), text);
  EXPECT_GT(g_io_calls.load(), 1001 / 3) << "the calls did not come through this test";
}

TEST_F(FsTest, ReadingPastTheEndIsDamageAndSaysWhere) {
  write("x", "12345");
  std::vector<std::byte> buffer(4);
  const auto file = fs_.open_read(dir_ / "x");
  EXPECT_NO_THROW(file->read_at(1, buffer));
  EXPECT_THROW(file->read_at(2, buffer), CorruptData);
  EXPECT_THROW(read_text(fs_, dir_ / "x", 4), CorruptData) << "more than the caller allows";
}

TEST_F(FsTest, NothingIsOverwritten) {
  write("x", "old");
  write("y", "new");
  EXPECT_EQ(error_of([&] { fs_.create_exclusive(dir_ / "x"); }), EEXIST);
  for (const bool lacking : {false, true}) {
    g_no_exclusive_rename = lacking;
    EXPECT_EQ(error_of([&] { fs_.rename_exclusive(dir_ / "y", dir_ / "x"); }), EEXIST);
    EXPECT_EQ(read("x"), "old");
    EXPECT_EQ(read("y"), "new");
  }
}

TEST_F(FsTest, RenamesWithAndWithoutTheSystemCall) {
  write("x", "text");
  fs_.rename_exclusive(dir_ / "x", dir_ / "y");
  g_no_exclusive_rename = true;
  fs_.rename_exclusive(dir_ / "y", dir_ / "z");
  EXPECT_THAT(fs_.list_directory(dir_.path()), ElementsAre("z"));
  EXPECT_EQ(read("z"), "text");
}

TEST_F(FsTest, LinksAreNotFollowedAndOnlyRegularFilesAreRead) {
  write("x", "text");
  ASSERT_EQ(::symlink((dir_ / "x").c_str(), (dir_ / "link").c_str()), 0);
  ASSERT_EQ(::symlink((dir_ / "elsewhere").c_str(), (dir_ / "dangling").c_str()), 0);
  ASSERT_EQ(::mkfifo((dir_ / "fifo").c_str(), 0600), 0);
  EXPECT_NE(error_of([&] { fs_.open_read(dir_ / "link"); }), 0);
  EXPECT_NE(error_of([&] { fs_.open_append(dir_ / "link"); }), 0);
  EXPECT_NE(error_of([&] { fs_.create_exclusive(dir_ / "dangling"); }), 0);
  EXPECT_FALSE(fs_.exists(dir_ / "elsewhere"));
  EXPECT_NE(error_of([&] { fs_.open_read(dir_ / "fifo"); }), 0) << "and does not wait for a writer";
  EXPECT_NE(error_of([&] { fs_.open_read(dir_.path()); }), 0);
  EXPECT_EQ(error_of([&] { fs_.open_read(dir_ / "absent"); }), ENOENT);
}

TEST_F(FsTest, AppendingGoesOnWithWhatIsThere) {
  write("x", "one ");
  const auto file = fs_.open_append(dir_ / "x");
  file->write_at(file->size(), bytes("two"));
  EXPECT_EQ(read("x"), "one two");
  EXPECT_NO_THROW(fs_.open_append(dir_ / "fresh"));
  EXPECT_EQ(mode_of(dir_ / "fresh"), 0600u);
}

TEST_F(FsTest, FoldersAreMadeListedAndRemoved) {
  make_directories(fs_, dir_ / "a/b/c/");
  make_directories(fs_, dir_ / "a/b/c");  // there already: fine
  EXPECT_EQ(mode_of(dir_ / "a/b"), 0700u);
  EXPECT_EQ(error_of([&] { fs_.make_directory(dir_ / "a"); }), EEXIST);
  write("a/2", ""), write("a/10", "");
  EXPECT_THAT(fs_.list_directory(dir_ / "a"), ElementsAre("10", "2", "b"));
  EXPECT_EQ(error_of([&] { fs_.remove_directory(dir_ / "a"); }), ENOTEMPTY);
  fs_.remove_directory(dir_ / "a/b/c");
  fs_.remove_file(dir_ / "a/2");
  fs_.remove_file(dir_ / "a/2");  // gone already: fine
  EXPECT_FALSE(fs_.exists(dir_ / "a/2"));
  EXPECT_FALSE(fs_.exists(dir_ / "a/10/below a file"));
  EXPECT_NO_THROW(fs_.sync_directory(dir_.path()));
  EXPECT_EQ(error_of([&] { fs_.list_directory(dir_ / "absent"); }), ENOENT);
}

TEST_F(FsTest, ManyProcessesMayMakeTheSameFolders) {
  std::vector<std::thread> threads;
  threads.reserve(8);
  std::atomic<int> failures{0};
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] { failures += error_of([&] { make_directories(fs_, dir_ / "p/q/r"); }) != 0; });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
}

TEST_F(FsTest, AFullDiskShowsBeforeAByteIsWritten) {
  const auto file = fs_.create_exclusive(dir_ / "x");
  EXPECT_NE(error_of([&] { file->allocate(uint64_t{1} << 60); }), 0);
}

TEST_F(FsTest, ClosingTwiceIsSaid) {
  const auto file = fs_.create_exclusive(dir_ / "x");
  file->close();
  EXPECT_EQ(error_of([&] { file->close(); }), EBADF);
}

}  // namespace
}  // namespace lockstep
