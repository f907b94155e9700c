/* The implementation, compiled once for all test programs. */
#define SPURMEM_IMPLEMENTATION
#include "../spurmem.h"
