// Times an ExecuTorch program call by call, as a native application makes them: the inputs, which
// are ones, are handed over before every call, since a program may use their memory for other
// things, and the program is run.
//
//     pte_loop FILE.pte THREADS WARMUP RUNS
//
// It prints two times of each of the RUNS calls in nanoseconds, one call a line: the whole, and
// running the program alone, which is what ExecuTorch's own executor_runner counts.
//
// Links to the runtime in executorch's wheel; ../overhead.py says how.

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace runtime = executorch::runtime;
using runtime::Error;
using runtime::Result;

// threadpool.h includes pthreadpool.h, which the wheel does not have. All that is needed of it:
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

namespace {

void check(Error error, const char* what) {
  if (error != Error::Ok) {
    std::fprintf(stderr, "%s: error 0x%x\n", what, static_cast<unsigned>(error));
    std::exit(1);
  }
}

template <class T>
T checked(Result<T> result, const char* what) {
  check(result.error(), what);
  return std::move(result.get());
}

class Bytes final : public runtime::DataLoader {
 public:
  explicit Bytes(std::string data) : data_(std::move(data)) {}

  Result<runtime::FreeableBuffer> load(
      size_t offset,
      size_t size,
      const SegmentInfo&) const override {
    if (size > data_.size() || offset > data_.size() - size) {
      return Error::InvalidArgument;
    }
    return runtime::FreeableBuffer(data_.data() + offset, size, nullptr);
  }

  Result<size_t> size() const override {
    return data_.size();
  }

 private:
  std::string data_;
};

// Takes from the heap; what was taken lasts until reset(), which the runtime calls after a kernel.
class Heap final : public runtime::MemoryAllocator {
 public:
  Heap() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment) override {
    if (!isPowerOf2(alignment)) {
      return nullptr;
    }
    taken_.push_back(std::make_unique<char[]>(size + alignment));
    void* start = taken_.back().get();
    size_t space = size + alignment;
    return std::align(alignment, size, start, space);
  }

  void reset() override {
    taken_.clear();
  }

 private:
  std::vector<std::unique_ptr<char[]>> taken_;
};

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(1);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

// An input of ones, and all that it points at.
struct Ones {
  explicit Ones(const runtime::TensorInfo& info)
      : sizes(info.sizes().begin(), info.sizes().end()),
        dim_order(info.dim_order().begin(), info.dim_order().end()),
        data(info.nbytes() / sizeof(float), 1.0F),
        tensor(info.scalar_type(), sizes.size(), sizes.data(), data.data(), dim_order.data()) {
    if (info.scalar_type() != executorch::aten::ScalarType::Float) {
      std::fprintf(stderr, "an input is not float32\n");
      std::exit(1);
    }
  }

  std::vector<executorch::aten::SizesType> sizes;
  std::vector<executorch::aten::DimOrderType> dim_order;
  std::vector<float> data;
  executorch::aten::TensorImpl tensor;
};

long long nanoseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: pte_loop FILE.pte THREADS WARMUP RUNS\n");
    return 2;
  }
  runtime::runtime_init();
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(
      static_cast<uint32_t>(std::atoi(argv[2])));

  Bytes bytes(read(argv[1]));
  const auto program = checked(runtime::Program::load(&bytes), "load");
  const auto meta = checked(program.method_meta("forward"), "method_meta");

  std::vector<std::vector<uint8_t>> buffers;
  std::vector<runtime::Span<uint8_t>> spans;
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    buffers.emplace_back(
        checked(meta.memory_planned_buffer_size(i), "planned buffer"));
  }
  for (auto& buffer : buffers) {
    spans.emplace_back(buffer.data(), buffer.size());
  }
  runtime::HierarchicalAllocator planned({spans.data(), spans.size()});
  Heap of_method;
  Heap temporary;
  runtime::MemoryManager memory(&of_method, &planned, &temporary);
  auto method = checked(program.load_method("forward", &memory), "load_method");
  std::vector<std::unique_ptr<Ones>> inputs;
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    inputs.push_back(std::make_unique<Ones>(checked(meta.input_tensor_meta(i), "input")));
  }
  const int warmup = std::atoi(argv[3]);
  const int runs = std::atoi(argv[4]);
  std::vector<std::pair<long long, long long>> times;
  times.reserve(warmup + runs);
  for (int run = 0; run < warmup + runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < inputs.size(); ++i) {
      check(method.set_input(executorch::aten::Tensor(&inputs[i]->tensor), i), "set_input");
    }
    const auto handed_over = std::chrono::steady_clock::now();
    check(method.execute(), "execute");
    const auto stop = std::chrono::steady_clock::now();
    times.emplace_back(nanoseconds(stop - start), nanoseconds(stop - handed_over));
  }
  for (auto call = times.begin() + warmup; call != times.end(); ++call) {
    std::printf("%lld %lld\n", call->first, call->second);
  }
  return 0;
}
