// A CUDA driver that has as many GPUs as its test says. Its SONAME is the real one's, so once it is loaded it is what
// dlopen("libcuda.so.1") finds.
namespace {
int g_devices = 0, g_init_result = 0;
}  // namespace

extern "C" {
void fake_driver_answers(int init_result, int devices) {
  g_init_result = init_result;
  g_devices = devices;
}
int cuInit(unsigned) { return g_init_result; }
int cuDeviceGetCount(int* count) {
  *count = g_devices;
  return 0;
}
}
