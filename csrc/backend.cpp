#include "backend.h"

#include <c10/util/Exception.h>

#include <map>

namespace pytracker {
namespace {

std::map<c10::DeviceType, BackendFactory>& factories() {
  static std::map<c10::DeviceType, BackendFactory> all;
  return all;
}

}  // namespace

bool register_backend(c10::DeviceType type, BackendFactory factory) {
  return factories().emplace(type, factory).second;
}

bool has_backend(c10::DeviceType type) { return factories().count(type) > 0; }

std::unique_ptr<Backend> make_backend(c10::Device device) {
  const auto found = factories().find(device.type());
  TORCH_CHECK(found != factories().end(), "pytracker has no native back end for ", device);
  return found->second(device);
}

}  // namespace pytracker
