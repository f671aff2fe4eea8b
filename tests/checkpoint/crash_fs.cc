#include "crash_fs.h"

#include <algorithm>
#include <cerrno>
#include <functional>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>

namespace lockstep {
namespace {

using Kind = CrashFs::Operation::Kind;
using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace

class CrashFile : public File {
 public:
  CrashFile(CrashFs& fs, size_t inode, std::string path) : fs_(fs), inode_(inode), path_(std::move(path)) {}

  void write_at(uint64_t offset, std::span<const std::byte> bytes) override {
    fs_.record({.kind = Kind::kWrite,
                .inode = inode_,
                .offset = offset,
                .bytes = std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())});
  }
  void read_at(uint64_t offset, std::span<std::byte> bytes) const override {
    const Lock lock(fs_.mutex_);
    const std::string& content = fs_.inodes_[inode_].content;
    if (content.size() < offset + bytes.size()) throw CorruptData("'" + path_ + "' ends too early");
    std::copy_n(content.data() + offset, bytes.size(), reinterpret_cast<char*>(bytes.data()));
  }
  void allocate(uint64_t size_bytes) override {
    fs_.record({.kind = Kind::kResize, .inode = inode_, .offset = size_bytes});
  }
  void sync() override { fs_.record({.kind = Kind::kSync, .inode = inode_}); }
  void close() override {}
  uint64_t size() const override {
    const Lock lock(fs_.mutex_);
    return fs_.inodes_[inode_].content.size();
  }

 private:
  CrashFs& fs_;
  size_t inode_;
  std::string path_;
};

CrashFs::CrashFs() { make_inode(/*is_directory=*/true); }

size_t CrashFs::make_inode(bool is_directory) {
  inodes_.push_back({.is_directory = is_directory});
  return inodes_.size() - 1;
}

void CrashFs::record(Operation operation) {
  const Lock lock(mutex_);
  apply(operation, nullptr, 0);
  if (operation.kind == Kind::kSync) {
    for (Operation& before : log_) {
      if (before.inode == operation.inode && before.synced_by == kNever) before.synced_by = log_.size();
    }
  }
  log_.push_back(std::move(operation));
}

// `losses`: of this operation, those of a write in order of their bytes.
void CrashFs::apply(const Operation& operation, const Loss* losses, size_t num_losses) {
  Inode& inode = inodes_[operation.inode];
  if (operation.kind == Kind::kWrite) {
    const std::string& bytes = operation.bytes;
    const auto put = [&](size_t begin, size_t end) {
      if (begin >= end) return;
      if (inode.content.size() < operation.offset + end) inode.content.resize(operation.offset + end);
      inode.content.replace(operation.offset + begin, end - begin, bytes, begin, end - begin);
    };
    size_t done = 0;
    for (size_t i = 0; i < num_losses; ++i) {
      put(done, losses[i].begin);
      done = losses[i].end;
    }
    put(done, bytes.size());
  } else if (num_losses == 0 && operation.kind == Kind::kResize) {
    inode.content.resize(operation.offset);
  } else if (num_losses == 0 && operation.kind == Kind::kNames) {
    for (const auto& [name, target] : operation.names) {
      if (target) {
        inode.names[name] = *target;
      } else {
        inode.names.erase(name);
      }
    }
  }
}

size_t CrashFs::num_operations() const {
  const Lock lock(mutex_);
  return log_.size();
}

std::vector<size_t> CrashFs::unsynced(size_t prefix) const {
  const Lock lock(mutex_);
  std::vector<size_t> numbers;
  for (size_t i = 0; i < prefix; ++i) {
    if (log_[i].kind != Kind::kSync && log_[i].synced_by >= prefix) numbers.push_back(i);
  }
  return numbers;
}

std::unique_ptr<CrashFs> CrashFs::after_power_loss(size_t prefix, const std::vector<Loss>& losses) const {
  auto left = std::make_unique<CrashFs>();
  left->inodes_.clear();
  for (const Inode& inode : inodes_) left->make_inode(inode.is_directory);
  size_t loss = 0;
  for (size_t i = 0; i < prefix; ++i) {
    const size_t first = loss;
    while (loss < losses.size() && losses[loss].operation == i) ++loss;
    left->apply(log_[i], losses.data() + first, loss - first);
  }
  LOCKSTEP_CHECK(loss == losses.size()) << "losses out of order, or behind the crash";
  return left;
}

std::string CrashFs::digest() const {
  const Lock lock(mutex_);
  format::Digester digester;
  const auto add = [&](const std::string& text) {
    const uint64_t size = text.size();  // first, so that no two trees give the same bytes
    digester.add(std::as_bytes(std::span(&size, 1)));
    digester.add(std::as_bytes(std::span(text.data(), text.size())));
  };
  const std::function<void(size_t)> add_inode = [&](size_t number) {
    const Inode& inode = inodes_[number];
    add(inode.is_directory ? "folder of " + std::to_string(inode.names.size()) : "file");
    if (!inode.is_directory) add(inode.content);
    for (const auto& [name, target] : inode.names) {
      add(name);
      add_inode(target);
    }
  };
  add_inode(0);
  return digester.hex();
}

std::optional<size_t> CrashFs::find(const std::string& path) const {
  size_t inode = 0;
  for (size_t begin = 1; begin < path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const auto found = inodes_[inode].names.find(path.substr(begin, end - begin));
    if (found == inodes_[inode].names.end()) return std::nullopt;
    inode = found->second;
    begin = end + 1;
  }
  return inode;
}

size_t CrashFs::parent(const std::string& path, std::string& name) const {
  const size_t slash = path.rfind('/');
  name = path.substr(slash + 1);
  const auto directory = find(path.substr(0, slash));
  if (!directory) throw IoError("looking for the folder of", path, ENOENT);
  return *directory;
}

std::unique_ptr<File> CrashFs::create_exclusive(const std::string& path, int) {
  const Lock lock(mutex_);
  std::string name;
  const size_t directory = parent(path, name);
  if (inodes_[directory].names.contains(name)) throw IoError("creating", path, EEXIST);
  const size_t inode = make_inode(/*is_directory=*/false);
  record({.kind = Kind::kNames, .inode = directory, .names = {{name, inode}}});
  return std::make_unique<CrashFile>(*this, inode, path);
}

std::unique_ptr<File> CrashFs::open_read(const std::string& path) {
  const Lock lock(mutex_);
  const auto inode = find(path);
  if (!inode || inodes_[*inode].is_directory) throw IoError("opening", path, inode ? EINVAL : ENOENT);
  return std::make_unique<CrashFile>(*this, *inode, path);
}

std::unique_ptr<File> CrashFs::open_append(const std::string& path, int mode) {
  const Lock lock(mutex_);
  return exists(path) ? open_read(path) : create_exclusive(path, mode);
}

void CrashFs::make_directory(const std::string& path, int) {
  const Lock lock(mutex_);
  std::string name;
  const size_t directory = parent(path, name);
  if (inodes_[directory].names.contains(name)) throw IoError("making directory", path, EEXIST);
  const size_t inode = make_inode(/*is_directory=*/true);
  record({.kind = Kind::kNames, .inode = directory, .names = {{name, inode}}});
}

void CrashFs::sync_directory(const std::string& path) {
  const Lock lock(mutex_);
  const auto directory = find(path);
  if (!directory) throw IoError("syncing directory", path, ENOENT);
  record({.kind = Kind::kSync, .inode = *directory});
}

void CrashFs::rename_exclusive(const std::string& from, const std::string& to) {
  const Lock lock(mutex_);
  if (exists(to)) throw IoError("renaming to", to, EEXIST);
  replace_file(from, to);
}

void CrashFs::replace_file(const std::string& from, const std::string& to) {
  const Lock lock(mutex_);
  std::string from_name, to_name;
  const size_t directory = parent(from, from_name);
  if (parent(to, to_name) != directory) throw IoError("renaming across folders to", to, EXDEV);
  const auto found = inodes_[directory].names.find(from_name);
  if (found == inodes_[directory].names.end()) throw IoError("renaming", from, ENOENT);
  record({.kind = Kind::kNames, .inode = directory, .names = {{from_name, std::nullopt}, {to_name, found->second}}});
}

void CrashFs::remove_file(const std::string& path) {
  const Lock lock(mutex_);
  std::string name;
  const size_t directory = parent(path, name);
  if (!inodes_[directory].names.contains(name)) return;
  record({.kind = Kind::kNames, .inode = directory, .names = {{name, std::nullopt}}});
}

void CrashFs::remove_directory(const std::string& path) {
  const Lock lock(mutex_);
  std::string name;
  const size_t directory = parent(path, name);
  const auto found = inodes_[directory].names.find(name);
  if (found == inodes_[directory].names.end()) return;
  if (!inodes_[found->second].names.empty()) throw IoError("removing directory", path, ENOTEMPTY);
  record({.kind = Kind::kNames, .inode = directory, .names = {{name, std::nullopt}}});
}

std::vector<std::string> CrashFs::list_directory(const std::string& path) {
  const Lock lock(mutex_);
  const auto directory = find(path);
  if (!directory) throw IoError("listing", path, ENOENT);
  std::vector<std::string> names;
  for (const auto& [name, inode] : inodes_[*directory].names) names.push_back(name);
  return names;
}

bool CrashFs::exists(const std::string& path) {
  const Lock lock(mutex_);
  return find(path).has_value();
}

}  // namespace lockstep
