// extern "C" entry points for tests/fake_steps.py: the step's launches, with addresses that the host can read.
#include <cstring>

#include "sampler/step_cuda.cu"

extern "C" void emulate_step(int output, const std::int64_t* params) {
  pidiff::StepParams p;
  std::memcpy(&p, params, sizeof p);
  output ? pidiff::queue_step_output(p, nullptr) : pidiff::queue_step_input(p, nullptr);
}
