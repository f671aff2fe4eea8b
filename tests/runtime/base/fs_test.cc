// The real file system, with system calls that this binary takes over to make them short, interrupted or unknown.
#undef _FORTIFY_SOURCE  // its inline pread would be a second definition
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "temp_dir.h"

namespace {

std::atomic<bool> g_hostile_io{false}, g_no_exclusive_rename{false};
std::atomic<int> g_io_calls{0};
std::function<void()> g_after_look;  // called once between looking at a file and opening it
std::atomic<int> g_no_openat2{0};    // the errno it fails with
std::atomic<uint32_t> g_fs_type{0};  // of every folder but /; 0: its own

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
int statfs(const char* path, struct statfs* status) noexcept {
  const long result = syscall(SYS_statfs, path, status);
  if (g_fs_type != 0 && std::strcmp(path, "/") != 0) status->f_type = g_fs_type;
  return static_cast<int>(result);
}
int fstatat(int at, const char* path, struct stat* status, int flags) noexcept {
  const long result = syscall(SYS_newfstatat, at, path, status, flags);
  if (const auto then = std::exchange(g_after_look, nullptr)) then();
  return static_cast<int>(result);
}
// The wrapper that libraries reach openat2 through.
// It cannot know how many arguments there are.
__attribute__((no_sanitize("address"))) long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& argument : a) argument = va_arg(list, long);
  va_end(list);
  if (number == SYS_openat2 && g_no_openat2 != 0) return errno = g_no_openat2, -1;
  static const auto real_syscall = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
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
  void SetUp() override { share_new_files(Share::kNone); }
  void TearDown() override {
    g_hostile_io = g_no_exclusive_rename = false;
    g_after_look = nullptr;
    g_no_openat2 = 0;
    g_fs_type = 0;
  }

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

TEST_F(FsTest, AWholeFileIsReplacedInOneStep) {
  write("y", "new");
  fs_.replace_file(dir_ / "y", dir_ / "x");
  write("y", "newer");
  fs_.replace_file(dir_ / "y", dir_ / "x");
  EXPECT_EQ(read("x"), "newer");
  EXPECT_FALSE(fs_.exists(dir_ / "y"));
  EXPECT_EQ(error_of([&] { fs_.replace_file(dir_ / "y", dir_ / "x"); }), ENOENT);
  EXPECT_EQ(read("x"), "newer");
}

TEST_F(FsTest, RenamesWithAndWithoutTheSystemCall) {
  write("x", "text");
  fs_.rename_exclusive(dir_ / "x", dir_ / "y");
  g_no_exclusive_rename = true;
  fs_.rename_exclusive(dir_ / "y", dir_ / "z");
  EXPECT_THAT(fs_.list_directory(dir_.path()), ElementsAre("z"));
  EXPECT_EQ(read("z"), "text");
}

TEST_F(FsTest, FoldersAreRenamedWithAndWithoutTheSystemCallAndReplaceNone) {
  for (const bool lacking : {false, true}) {
    g_no_exclusive_rename = lacking;
    make_directories(fs_, dir_ / "a");
    write("a/x", "text");
    make_directories(fs_, dir_ / "empty");
    EXPECT_EQ(error_of([&] { fs_.rename_exclusive(dir_ / "a", dir_ / "empty"); }), EEXIST) << lacking;
    fs_.rename_exclusive(dir_ / "a", dir_ / "b");
    EXPECT_THAT(fs_.list_directory(dir_.path()), ElementsAre("b", "empty")) << lacking;
    EXPECT_EQ(read("b/x"), "text");
    std::filesystem::remove_all(dir_ / "b");
  }
}

TEST_F(FsTest, NamesShowLateOnNetworkFileSystemsAlone) {
  for (const uint32_t local : {0xEF53U, 0x58465342U, 0x01021994U, 0x9123683EU, 0x794C7630U}) {  // ext4, XFS, tmpfs, ...
    g_fs_type = local;
    EXPECT_FALSE(fs_.shows_late(dir_.path())) << local;
  }
  for (const uint32_t network :
       {0x6969U, 0xFF534D42U, 0x0BD00BD0U, 0x65735546U, 0x01021997U}) {  // NFS, CIFS, Lustre, ...
    g_fs_type = network;
    EXPECT_TRUE(fs_.shows_late(dir_.path())) << network;
    EXPECT_TRUE(fs_.shows_late(dir_ / "not/there/yet")) << network;
    EXPECT_TRUE(fs_.shows_late("not/there/yet")) << network;
  }
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

// Names of an open folder: what a checkpoint's manifest may say, at its worst.
class FolderTest : public FsTest, public testing::WithParamInterface<int> {
 protected:
  void SetUp() override {
    FsTest::SetUp();
    make_directories(fs_, dir_ / "inside");
    write("inside/shard", "shard");
    write("outside", "outside");
    g_no_openat2 = GetParam();
  }
  int error_of_opening(const std::string& name) {
    return error_of([&] { fs_.open_folder(dir_ / "inside")->open_read(name); });
  }
  std::string inside(const std::string& name) { return dir_ / "inside/" + name; }
};

TEST_P(FolderTest, OnlyNamesOfTheFolderItselfAreOpened) {
  EXPECT_EQ(error_of_opening("shard"), 0);
  for (const std::string& name :
       {std::string("../outside"), dir_ / "outside", std::string("./shard"), std::string(".."), std::string("."),
        std::string(""), std::string("shard/"), std::string("/")})
    EXPECT_EQ(error_of_opening(name), EINVAL) << name;
  EXPECT_EQ(error_of_opening("absent"), ENOENT);
}

TEST_P(FolderTest, LinksFifosFoldersSocketsAndDevicesAreRefusedAtOnce) {
  ASSERT_EQ(::symlink("../outside", inside("link").c_str()), 0);
  ASSERT_EQ(::symlink("shard", inside("link_inside").c_str()), 0);
  ASSERT_EQ(::mkfifo(inside("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::mkdir(inside("folder").c_str(), 0700), 0);
  ASSERT_EQ(::mknod(inside("socket").c_str(), S_IFSOCK | 0600, 0), 0);
  EXPECT_EQ(error_of_opening("link"), ELOOP);
  EXPECT_EQ(error_of_opening("link_inside"), ELOOP);
  for (const char* name : {"fifo", "folder", "socket"}) EXPECT_EQ(error_of_opening(name), EINVAL) << name;
  if (::mknod(inside("zero").c_str(), S_IFCHR | 0600, makedev(1, 5)) == 0) {
    EXPECT_EQ(error_of_opening("zero"), EINVAL);
  } else {
    EXPECT_NE(::geteuid(), 0U) << "only root makes devices";
  }
}

TEST_P(FolderTest, AnExchangeBetweenLookingAndOpeningIsFound) {
  const std::pair<const char*, std::function<int()>> exchanges[] = {
      {"a link to elsewhere", [&] { return ::symlink("../outside", inside("shard").c_str()); }},
      {"a FIFO", [&] { return ::mkfifo(inside("shard").c_str(), 0600); }},
      {"a folder", [&] { return ::mkdir(inside("shard").c_str(), 0700); }},
  };
  for (const auto& [what, make] : exchanges) {
    std::filesystem::remove(inside("shard"));
    write("inside/shard", "shard");
    bool exchanged = false;
    g_after_look = [&, &make = make] {
      std::filesystem::remove(inside("shard"));
      exchanged = make() == 0;
    };
    const int error = error_of_opening("shard");
    EXPECT_TRUE(exchanged) << what;
    EXPECT_TRUE(error == ELOOP || error == EINVAL) << what << ": errno " << error;
  }
}

TEST_P(FolderTest, StaysTheFolderThatWasOpenedWhateverItsPathLeadsTo) {
  const auto folder = fs_.open_folder(dir_ / "inside");
  ASSERT_EQ(::rename((dir_ / "inside").c_str(), (dir_ / "moved").c_str()), 0);
  make_directories(fs_, dir_ / "inside");
  write("inside/shard", "of another");
  const auto file = folder->open_read("shard");
  EXPECT_EQ(read_all(*file, "shard", 100), "shard");
}

// openat2 came with Linux 5.6, and sandboxes refuse it.
INSTANTIATE_TEST_SUITE_P(WithAndWithoutOpenat2, FolderTest, testing::Values(0, ENOSYS, EPERM));

TEST_F(FsTest, AFileKnowsItsOwner) {
  write("x", "");
  EXPECT_EQ(fs_.open_read(dir_ / "x")->owner(), ::geteuid());
  if (::geteuid() != 0) GTEST_SKIP() << "only root gives files away";
  ASSERT_EQ(::chown((dir_ / "x").c_str(), 65534, 65534), 0);
  EXPECT_EQ(fs_.open_read(dir_ / "x")->owner(), 65534U);
}

TEST_F(FsTest, TheGroupReadsWhatIsSharedAndNobodyElseAnything) {
  share_new_files(Share::kGroup);
  write("x", "");
  make_directories(fs_, dir_ / "a");
  EXPECT_EQ(mode_of(dir_ / "x"), 0640U);
  EXPECT_EQ(mode_of(dir_ / "a"), 0750U);
  share_new_files(Share::kNone);
  write("y", "");
  make_directories(fs_, dir_ / "b");
  EXPECT_EQ(mode_of(dir_ / "y"), 0600U);
  EXPECT_EQ(mode_of(dir_ / "b"), 0700U);
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
