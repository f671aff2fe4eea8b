#include "crash_fs.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <lockstep/base/error.h>

namespace lockstep {
namespace {

using Inode = CrashFs::Inode;
using Lock = std::lock_guard<std::recursive_mutex>;
constexpr size_t kSector = 512;  // what a disk writes whole

std::string torn(const Inode& file, std::mt19937& random, double keep) {
  std::bernoulli_distribution kept(keep);
  std::string content = file.durable_content;
  if (content.size() != file.content.size() && kept(random)) content.resize(file.content.size());
  for (size_t begin = 0; begin < std::min(content.size(), file.content.size()); begin += kSector) {
    const size_t bytes = std::min(kSector, std::min(content.size(), file.content.size()) - begin);
    if (kept(random)) content.replace(begin, bytes, file.content, begin, bytes);
  }
  return content;
}

std::shared_ptr<Inode> image(const Inode& inode, std::mt19937& random, double keep) {
  auto left = std::make_shared<Inode>();
  left->is_directory = inode.is_directory;
  if (!inode.is_directory) {
    left->content = left->durable_content = torn(inode, random, keep);
    return left;
  }
  auto entries = inode.durable_entries;
  std::bernoulli_distribution kept(keep);
  for (const auto& change : inode.pending) {
    if (!kept(random)) continue;
    for (const auto& [name, target] : change) {
      if (target) {
        entries[name] = target;
      } else {
        entries.erase(name);
      }
    }
  }
  for (const auto& [name, target] : entries) left->entries[name] = image(*target, random, keep);
  left->durable_entries = left->entries;
  return left;
}

std::shared_ptr<Inode> clone(const std::shared_ptr<Inode>& inode,
                             std::map<const Inode*, std::shared_ptr<Inode>>& done) {
  if (!inode) return nullptr;
  auto& copy = done[inode.get()];
  if (copy) return copy;
  copy = std::make_shared<Inode>(*inode);
  auto result = copy;  // the map may grow under `copy`
  for (auto* entries : {&result->entries, &result->durable_entries}) {
    for (auto& [name, target] : *entries) target = clone(target, done);
  }
  for (auto& change : result->pending) {
    for (auto& [name, target] : change) target = clone(target, done);
  }
  return result;
}

}  // namespace

class CrashFile : public File {
 public:
  CrashFile(CrashFs& fs, std::shared_ptr<Inode> inode, std::string path)
      : fs_(fs), inode_(std::move(inode)), path_(std::move(path)) {}

  void write_at(uint64_t offset, std::span<const std::byte> bytes) override {
    const Lock lock(fs_.mutex_);
    fs_.before_change();
    if (inode_->content.size() < offset + bytes.size()) inode_->content.resize(offset + bytes.size());
    if (!bytes.empty()) std::memcpy(inode_->content.data() + offset, bytes.data(), bytes.size());
  }
  void read_at(uint64_t offset, std::span<std::byte> bytes) const override {
    const Lock lock(fs_.mutex_);
    if (inode_->content.size() < offset + bytes.size()) throw CorruptData("'" + path_ + "' ends too early");
    if (!bytes.empty()) std::memcpy(bytes.data(), inode_->content.data() + offset, bytes.size());
  }
  void allocate(uint64_t size_bytes) override {
    const Lock lock(fs_.mutex_);
    fs_.before_change();
    inode_->content.resize(size_bytes);
  }
  void sync() override {
    const Lock lock(fs_.mutex_);
    fs_.before_change();
    inode_->durable_content = inode_->content;
  }
  void close() override {}
  uint64_t size() const override {
    const Lock lock(fs_.mutex_);
    return inode_->content.size();
  }

 private:
  CrashFs& fs_;
  std::shared_ptr<Inode> inode_;
  std::string path_;
};

CrashFs::CrashFs() : root_(std::make_shared<Inode>()) { root_->is_directory = true; }

std::unique_ptr<CrashFs> CrashFs::after_power_loss(std::mt19937& random, double keep) const {
  const Lock lock(mutex_);
  auto left = std::make_unique<CrashFs>();
  left->root_ = image(*root_, random, keep);
  return left;
}

std::unique_ptr<CrashFs> CrashFs::copy() const {
  const Lock lock(mutex_);
  auto same = std::make_unique<CrashFs>();
  std::map<const Inode*, std::shared_ptr<Inode>> done;
  same->root_ = clone(root_, done);
  return same;
}

void CrashFs::before_change() {
  if (before_change_) before_change_();
}

std::shared_ptr<Inode> CrashFs::find(const std::string& path) const {
  std::shared_ptr<Inode> inode = root_;
  for (size_t begin = 1; inode && begin < path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const auto found = inode->entries.find(path.substr(begin, end - begin));
    inode = found == inode->entries.end() ? nullptr : found->second;
    begin = end + 1;
  }
  return inode;
}

std::shared_ptr<Inode> CrashFs::parent(const std::string& path, std::string& name) const {
  const size_t slash = path.rfind('/');
  name = path.substr(slash + 1);
  auto directory = find(path.substr(0, slash));
  if (!directory) throw IoError("looking for the folder of", path, ENOENT);
  return directory;
}

void CrashFs::change(const std::shared_ptr<Inode>& directory, const Inode::Change& change) {
  for (const auto& [name, target] : change) {
    if (target) {
      directory->entries[name] = target;
    } else {
      directory->entries.erase(name);
    }
  }
  directory->pending.push_back(change);
}

std::unique_ptr<File> CrashFs::create_exclusive(const std::string& path, int) {
  const Lock lock(mutex_);
  before_change();
  std::string name;
  const auto directory = parent(path, name);
  if (directory->entries.contains(name)) throw IoError("creating", path, EEXIST);
  auto inode = std::make_shared<Inode>();
  change(directory, {{name, inode}});
  return std::make_unique<CrashFile>(*this, inode, path);
}

std::unique_ptr<File> CrashFs::open_read(const std::string& path) {
  const Lock lock(mutex_);
  auto inode = find(path);
  if (!inode || inode->is_directory) throw IoError("opening", path, inode ? EINVAL : ENOENT);
  return std::make_unique<CrashFile>(*this, std::move(inode), path);
}

std::unique_ptr<File> CrashFs::open_append(const std::string& path, int mode) {
  const Lock lock(mutex_);
  return exists(path) ? open_read(path) : create_exclusive(path, mode);
}

void CrashFs::make_directory(const std::string& path, int) {
  const Lock lock(mutex_);
  before_change();
  std::string name;
  const auto directory = parent(path, name);
  if (directory->entries.contains(name)) throw IoError("making directory", path, EEXIST);
  auto inode = std::make_shared<Inode>();
  inode->is_directory = true;
  change(directory, {{name, inode}});
}

void CrashFs::sync_directory(const std::string& path) {
  const Lock lock(mutex_);
  before_change();
  const auto directory = find(path);
  if (!directory) throw IoError("syncing directory", path, ENOENT);
  directory->durable_entries = directory->entries;
  directory->pending.clear();
}

void CrashFs::rename_exclusive(const std::string& from, const std::string& to) {
  const Lock lock(mutex_);
  before_change();
  std::string from_name, to_name;
  const auto directory = parent(from, from_name);
  if (parent(to, to_name) != directory) throw IoError("renaming across folders to", to, EXDEV);
  if (directory->entries.contains(to_name)) throw IoError("renaming to", to, EEXIST);
  const auto inode = directory->entries.at(from_name);
  change(directory, {{from_name, nullptr}, {to_name, inode}});
}

void CrashFs::remove_file(const std::string& path) {
  const Lock lock(mutex_);
  before_change();
  std::string name;
  const auto directory = parent(path, name);
  if (directory->entries.contains(name)) change(directory, {{name, nullptr}});
}

void CrashFs::remove_directory(const std::string& path) {
  const Lock lock(mutex_);
  before_change();
  std::string name;
  const auto directory = parent(path, name);
  const auto found = directory->entries.find(name);
  if (found == directory->entries.end()) return;
  if (!found->second->entries.empty()) throw IoError("removing directory", path, ENOTEMPTY);
  change(directory, {{name, nullptr}});
}

std::vector<std::string> CrashFs::list_directory(const std::string& path) {
  const Lock lock(mutex_);
  const auto directory = find(path);
  if (!directory) throw IoError("listing", path, ENOENT);
  std::vector<std::string> names;
  for (const auto& [name, inode] : directory->entries) names.push_back(name);
  return names;
}

bool CrashFs::exists(const std::string& path) {
  const Lock lock(mutex_);
  return find(path) != nullptr;
}

}  // namespace lockstep
