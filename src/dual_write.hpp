// Capture: the triggers that keep dest equal to the mapping of origin from the moment they exist.
#pragma once
#include "compat.hpp"

namespace migrate {

void init_dual_write();

}  // namespace migrate
