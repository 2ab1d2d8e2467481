#pragma once

#include <string>

namespace simt {

/// "f<float>(float*)" of a function of this program, static ones too; "?" where it has no symbols.
std::string name_of_function(const void* address);

}  // namespace simt
