#include <algorithm>
#include <cerrno>
#include <map>
#include <mutex>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>

namespace lockstep {

class FaultFs::State {
 public:
  State(Fs& real, Decide decide) : real_(real), decide_(std::move(decide)) {}

  Fs& real() { return real_; }

  // Counts the call, asks what to do, and throws the error unless a torn write has to happen first.
  Fault before(const std::string& kind, const std::string& path, const std::string& extent = "",
               bool can_tear = false) {
    Fault fault;
    {
      const std::lock_guard lock(mutex_);
      log_.push_back(kind + " " + path + extent);
      fault = decide_(kind, path, calls_++);
    }
    if (fault.error_number != 0 && !(can_tear && fault.short_bytes >= 0))
      throw IoError(kind + " (injected)", path, fault.error_number);
    return fault;
  }

  // Whether this look at `path` finds what is there.
  bool is_visible(const std::string& path) {
    const std::lock_guard lock(mutex_);
    const auto late = late_.find(path);
    return late == late_.end() || late->second-- <= 0;
  }

  void look_for(const std::string& path) {
    if (!is_visible(path)) throw IoError("open (injected, not visible yet)", path, ENOENT);
  }

  void show_late(const std::string& path, int64_t looks) {
    const std::lock_guard lock(mutex_);
    late_[path] = looks;
  }

  bool shows_late(const std::string& path) {
    const std::lock_guard lock(mutex_);
    return !late_.empty() || real_.shows_late(path);
  }

  int64_t calls() {
    const std::lock_guard lock(mutex_);
    return calls_;
  }

  std::vector<std::string> log() {
    const std::lock_guard lock(mutex_);
    return log_;
  }

 private:
  Fs& real_;
  Decide decide_;
  std::mutex mutex_;
  int64_t calls_ = 0;
  std::vector<std::string> log_;
  std::map<std::string, int64_t> late_;  // looks that will not find it
};

namespace {

std::string extent(uint64_t offset, size_t length) {
  return " " + std::to_string(offset) + " " + std::to_string(length);
}

class FaultFile : public File {
 public:
  FaultFile(std::shared_ptr<FaultFs::State> state, std::unique_ptr<File> real, std::string path)
      : state_(std::move(state)), real_(std::move(real)), path_(std::move(path)) {}

  void write_at(uint64_t offset, std::span<const std::byte> bytes) override {
    const Fault fault = state_->before("write", path_, extent(offset, bytes.size()), /*can_tear=*/true);
    if (fault.drop) return;
    if (fault.short_bytes >= 0) bytes = bytes.first(std::min(bytes.size(), static_cast<size_t>(fault.short_bytes)));
    real_->write_at(offset, bytes);
    if (fault.error_number != 0) throw IoError("write (injected, torn)", path_, fault.error_number);
  }

  void read_at(uint64_t offset, std::span<std::byte> bytes) const override {
    state_->before("read", path_, extent(offset, bytes.size()));
    real_->read_at(offset, bytes);
  }

  void allocate(uint64_t size_bytes) override {
    if (!state_->before("allocate", path_, extent(0, size_bytes)).drop) real_->allocate(size_bytes);
  }

  void sync() override {
    if (!state_->before("sync", path_).drop) real_->sync();
  }

  void close() override {
    state_->before("close", path_);
    real_->close();
  }

  uint64_t size() const override { return real_->size(); }
  uint32_t owner() const override { return real_->owner(); }

 private:
  std::shared_ptr<FaultFs::State> state_;
  std::unique_ptr<File> real_;
  std::string path_;
};

class FaultFolder : public Folder {
 public:
  FaultFolder(std::shared_ptr<FaultFs::State> state, std::unique_ptr<Folder> real, std::string path)
      : state_(std::move(state)), real_(std::move(real)), path_(std::move(path)) {}

  std::unique_ptr<File> open_read(const std::string& name) override {
    const std::string path = path_ + "/" + name;
    state_->before("open", path);
    state_->look_for(path);
    return std::make_unique<FaultFile>(state_, real_->open_read(name), path);
  }

 private:
  std::shared_ptr<FaultFs::State> state_;
  std::unique_ptr<Folder> real_;
  std::string path_;
};

}  // namespace

FaultFs::FaultFs(Fs& real, Decide decide) : state_(std::make_shared<State>(real, std::move(decide))) {}
FaultFs::~FaultFs() = default;

void FaultFs::show_late(const std::string& path, int64_t looks) { state_->show_late(path, looks); }
int64_t FaultFs::calls() const { return state_->calls(); }
std::vector<std::string> FaultFs::log() const { return state_->log(); }

std::unique_ptr<File> FaultFs::create_exclusive(const std::string& path, int mode) {
  state_->before("open", path);
  return std::make_unique<FaultFile>(state_, state_->real().create_exclusive(path, mode), path);
}

std::unique_ptr<File> FaultFs::open_read(const std::string& path) {
  state_->before("open", path);
  state_->look_for(path);
  return std::make_unique<FaultFile>(state_, state_->real().open_read(path), path);
}

std::unique_ptr<File> FaultFs::open_append(const std::string& path, int mode) {
  state_->before("open", path);
  return std::make_unique<FaultFile>(state_, state_->real().open_append(path, mode), path);
}

void FaultFs::make_directory(const std::string& path, int mode) {
  if (!state_->before("mkdir", path).drop) state_->real().make_directory(path, mode);
}

void FaultFs::sync_directory(const std::string& path) {
  if (!state_->before("sync_directory", path).drop) state_->real().sync_directory(path);
}

void FaultFs::rename_exclusive(const std::string& from, const std::string& to) {
  if (!state_->before("rename", to).drop) state_->real().rename_exclusive(from, to);
}

void FaultFs::replace_file(const std::string& from, const std::string& to) {
  if (!state_->before("rename", to).drop) state_->real().replace_file(from, to);
}

void FaultFs::remove_file(const std::string& path) {
  if (!state_->before("unlink", path).drop) state_->real().remove_file(path);
}

void FaultFs::remove_directory(const std::string& path) {
  if (!state_->before("rmdir", path).drop) state_->real().remove_directory(path);
}

std::vector<std::string> FaultFs::list_directory(const std::string& path) {
  state_->before("list", path);
  return state_->real().list_directory(path);
}

std::unique_ptr<Folder> FaultFs::open_folder(const std::string& path) {
  state_->before("open", path);
  state_->look_for(path);
  return std::make_unique<FaultFolder>(state_, state_->real().open_folder(path), path);
}

bool FaultFs::exists(const std::string& path) { return state_->is_visible(path) && state_->real().exists(path); }
bool FaultFs::shows_late(const std::string& path) { return state_->shows_late(path); }

}  // namespace lockstep
