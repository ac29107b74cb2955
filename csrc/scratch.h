// Memory for the time of a call.
#pragma once

#include <cstdint>
#include <functional>

namespace fastvae {

// Gives memory of the device that lives until what is launched now has run, aligned to 16 bytes.
using Scratch = std::function<void*(int64_t bytes)>;

}  // namespace fastvae
