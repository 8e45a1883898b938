#include "parallel.h"

#include <pthread.h>

#include <fstream>
#include <sstream>
#include <string>

namespace pytracker {
namespace {

constexpr unsigned long kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC of Linux

// Whether this process was forked before this library was loaded. Linux notes it; elsewhere it is taken for one that
// was not. /proc/self/stat: pid (command) state ppid group session terminal its_group flags ...
bool was_forked() {
  std::ifstream file("/proc/self/stat");
  std::string line, skipped;
  if (!std::getline(file, line)) return false;
  std::istringstream fields(line.substr(line.rfind(')') + 1));
  unsigned long flags = 0;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  return (fields >> flags) && (flags & kForkedWithoutExec) != 0;
}

bool forked = was_forked();
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() { return forked; }

}  // namespace pytracker
