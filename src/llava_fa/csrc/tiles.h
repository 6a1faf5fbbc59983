// Whether this CPU has the matrix instructions of AMX, and the system lets this process use them.
#pragma once

namespace llava_fa {

bool has_int8_tiles();
bool has_bf16_tiles();

}  // namespace llava_fa
