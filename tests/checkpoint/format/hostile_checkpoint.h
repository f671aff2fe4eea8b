#pragma once

#include <random>
#include <string>
#include <vector>

namespace lockstep::format {

/// Makes checkpoints that somebody wants to hurt with: every checksum in them is right, so nothing but our rules keeps
/// them out.
class HostileCheckpoints {
 public:
  /// @param elsewhere an existing folder that a checkpoint must not reach; files worth reading are put into it.
  HostileCheckpoints(std::string elsewhere, unsigned seed);

  /// Fills the folder `directory`, emptied first, with another one. @return what is wrong with it.
  std::string make(const std::string& directory);

 private:
  struct Shard {
    std::string name, head, data;
  };
  std::string spoil_name();
  std::string spoil_file(const std::string& directory);
  std::string spoil_header();
  std::string spoil_text(std::string& text, size_t begin);
  void write(const std::string& directory);

  std::string elsewhere_;
  std::mt19937 random_;
  std::vector<Shard> good_;
  std::string good_tensors_;
  std::vector<Shard> shards_;
  std::string tensors_;
  bool spoils_manifest_ = false;
  std::string exchanged_;  // a file that spoil_file() has put there itself
};

}  // namespace lockstep::format
