#include <lockstep/nn/remake.h>

namespace lockstep::nn {
namespace {

thread_local RemakeListener* t_listener = nullptr;

}  // namespace

RemakeScope::RemakeScope(RemakeListener* listener) : was_(t_listener) { t_listener = listener; }
RemakeScope::~RemakeScope() { t_listener = was_; }
RemakeListener* RemakeScope::listener() { return t_listener; }

}  // namespace lockstep::nn
