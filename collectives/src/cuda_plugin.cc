#include "cuda_plugin.h"

#include <dlfcn.h>

namespace lockstep {
namespace {

// libcollectives' own folder, with a slash: the plug-in lies beside it, in the build tree and where it is installed.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&load_cuda_plugin), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

// The driver alone, as any program would ask it.
std::string ask_driver(bool* has_driver) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return "there is no CUDA driver (libcuda.so.1) on this machine";
  const auto initialize = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int devices = 0;
  const int code = initialize == nullptr || count == nullptr ? -1 : initialize(0);
  if (code != 0) return "the CUDA driver does not start (cuInit says " + std::to_string(code) + ")";
  if (count(&devices) != 0 || devices == 0) return "the CUDA driver sees no GPU";
  *has_driver = true;
  return "";
}

}  // namespace

CudaState load_cuda_plugin(const std::string& folder) {
  CudaState state;
  state.why = ask_driver(&state.has_driver);
  if (!state.has_driver) {
    state.why += ". Mend: run on a machine with a GPU, or without --device=cuda and --backend=nccl";
    return state;
  }
  const std::string path = (folder.empty() ? own_folder() : folder + "/") + "liblockstep_cuda.so";
  // Global: torch's CUDA half registers itself with the half that is loaded, and later libraries look there.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    state.why = std::string("the CUDA plug-in does not load (") + dlerror() +
                "). Mend: build with LOCKSTEP_CUDA=ON where NCCL's headers are, or put the folders of the CUDA "
                "libraries it misses into LD_LIBRARY_PATH";
    return state;
  }
  const auto entry = reinterpret_cast<decltype(&lockstep_cuda_plugin)>(dlsym(library, "lockstep_cuda_plugin"));
  state.plugin = entry == nullptr ? nullptr : entry(CudaPlugin::kVersion);
  if (state.plugin == nullptr) {
    state.why = "the CUDA plug-in " + path + " was built for another lockstep. Mend: build and install both together";
  }
  return state;
}

}  // namespace lockstep
