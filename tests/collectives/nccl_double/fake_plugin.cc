// A plug-in that knows no GPU: enough to see how it is loaded. FAKE_PLUGIN_VERSION is what it claims to be built for.
#include "cuda_plugin.h"

static constexpr lockstep::CudaPlugin kPlugin{[] { return 4; }, [](int) {}, nullptr};

extern "C" const lockstep::CudaPlugin* lockstep_cuda_plugin(int version) {
  return version == FAKE_PLUGIN_VERSION ? &kPlugin : nullptr;
}
