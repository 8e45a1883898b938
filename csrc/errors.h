// The exceptions that reach Python as classes of pytracker.errors; bindings.cpp translates them.
#pragma once

#include <stdexcept>

namespace pytracker {

struct ParameterError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct InvalidValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct InvalidTypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace pytracker
