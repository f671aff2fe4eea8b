#pragma once

#include <cerrno>
#include <map>
#include <memory>
#include <string>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

namespace lockstep::format {

/// Files in memory: a fuzzer tries thousands of checkpoints a second. Flat; folders are not kept.
class MemoryFs : public Fs {
 public:
  std::map<std::string, std::string> files;

  std::unique_ptr<File> create_exclusive(const std::string& path, int) override {
    if (!files.try_emplace(path).second) throw IoError("creating", path, EEXIST);
    return std::make_unique<MemoryFile>(files[path], path);
  }
  std::unique_ptr<File> open_read(const std::string& path) override {
    const auto found = files.find(path);
    if (found == files.end()) throw IoError("opening", path, ENOENT);
    return std::make_unique<MemoryFile>(found->second, path);
  }
  std::unique_ptr<File> open_append(const std::string& path, int) override { return open_read(path); }
  void make_directory(const std::string&, int) override {}
  void sync_directory(const std::string&) override {}
  void rename_exclusive(const std::string& from, const std::string& to) override {
    files[to] = files.extract(from).mapped();
  }
  void replace_file(const std::string& from, const std::string& to) override { rename_exclusive(from, to); }
  void remove_file(const std::string& path) override { files.erase(path); }
  void remove_directory(const std::string&) override {}
  std::vector<std::string> list_directory(const std::string&) override { return {}; }
  bool exists(const std::string& path) override { return files.contains(path); }

 private:
  class MemoryFile : public File {
   public:
    MemoryFile(std::string& bytes, std::string path) : bytes_(bytes), path_(std::move(path)) {}
    void write_at(uint64_t offset, std::span<const std::byte> bytes) override {
      if (bytes_.size() < offset + bytes.size()) bytes_.resize(offset + bytes.size());
      std::copy_n(reinterpret_cast<const char*>(bytes.data()), bytes.size(), bytes_.data() + offset);
    }
    void read_at(uint64_t offset, std::span<std::byte> bytes) const override {
      if (offset > bytes_.size() || bytes.size() > bytes_.size() - offset)
        throw CorruptData("'" + path_ + "' ends too early");
      std::copy_n(bytes_.data() + offset, bytes.size(), reinterpret_cast<char*>(bytes.data()));
    }
    void allocate(uint64_t size_bytes) override { bytes_.resize(std::max<uint64_t>(bytes_.size(), size_bytes)); }
    void sync() override {}
    void close() override {}
    uint64_t size() const override { return bytes_.size(); }

   private:
    std::string& bytes_;
    std::string path_;
  };
};

}  // namespace lockstep::format
