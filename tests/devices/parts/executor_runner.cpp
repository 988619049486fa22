// Runs a .pte file as ExecuTorch's own executor_runner does, with its options and its messages,
// linked to the runtime inside a Python wheel. Options: --model_path, --inputs (files of raw
// numbers, separated by commas; else ones), --output_file, --num_executions, --cpu_threads,
// --print_output (all, summary or none).
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/log.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

// Declared here, since the wheel's own header includes one of pthreadpool's that it does not ship.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

std::map<std::string, std::string> options = {
    {"model_path", "model.pte"}, {"inputs", ""},        {"output_file", ""},
    {"num_executions", "1"},     {"cpu_threads", "-1"}, {"print_output", "summary"},
};

void parse_options(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i] + std::min<size_t>(std::strspn(argv[i], "-"), 2);
    std::string value;
    const size_t equals = name.find('=');
    if (equals != std::string::npos) {
      value = name.substr(equals + 1);
      name.resize(equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    }
    if (argv[i][0] != '-' && equals != std::string::npos) {
      std::exit(1);
    }
    if (!options.count(name)) {
      std::fprintf(stderr, "ERROR: unknown command line flag '%s'\n", name.c_str());
      std::exit(1);
    }
    options[name] = value;
  }
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  ET_CHECK_MSG(file.good(), "Failed to open file: %s", path.c_str());
  return {std::istreambuf_iterator<char>(file), {}};
}

// A program that lies in memory, aligned as a mapped file would be.
class Loader final : public DataLoader {
 public:
  explicit Loader(const std::string& bytes) : size_(bytes.size()) {
    data_.reset(static_cast<char*>(std::aligned_alloc(4096, (size_ + 4095) / 4096 * 4096)));
    std::memcpy(data_.get(), bytes.data(), size_);
  }
  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    ET_CHECK_OR_RETURN_ERROR(offset + size <= size_, InvalidArgument, "beyond the file's end");
    return FreeableBuffer(data_.get() + offset, size, nullptr);
  }
  Error load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const override {
    ET_CHECK_OR_RETURN_ERROR(offset + size <= size_, InvalidArgument, "beyond the file's end");
    std::memcpy(buffer, data_.get() + offset, size);
    return Error::Ok;
  }
  Result<size_t> size() const override { return size_; }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  size_t size_;
  std::unique_ptr<char, Free> data_;
};

// An input with what it points to.
struct Input {
  std::vector<executorch::aten::SizesType> sizes;
  std::vector<executorch::aten::DimOrderType> order;
  std::vector<executorch::aten::StridesType> strides;
  std::string data;
  std::unique_ptr<TensorImpl> tensor;
};

template <class T>
std::string ones(size_t nbytes) {
  std::vector<T> values(nbytes / sizeof(T), T(1));
  return {reinterpret_cast<const char*>(values.data()), nbytes};
}

std::string ones(ScalarType type, size_t nbytes) {
  switch (type) {
    case ScalarType::Float:
      return ones<float>(nbytes);
    case ScalarType::Int:
      return ones<int32_t>(nbytes);
    case ScalarType::Long:
      return ones<int64_t>(nbytes);
    default:
      return ones<int8_t>(nbytes);
  }
}

std::vector<Input> make_inputs(const MethodMeta& meta) {
  std::vector<std::string> files;
  std::stringstream list(options["inputs"]);
  for (std::string path; std::getline(list, path, ',');) {
    files.push_back(path);
  }
  std::vector<Input> inputs(meta.num_inputs());
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (meta.input_tag(i).get() != Tag::Tensor) {
      continue;
    }
    const TensorInfo info = meta.input_tensor_meta(i).get();
    Input& input = inputs[i];
    input.sizes.assign(info.sizes().begin(), info.sizes().end());
    input.order.assign(info.dim_order().begin(), info.dim_order().end());
    input.strides.resize(input.sizes.size());
    dim_order_to_stride_nocheck(
        input.sizes.data(), input.order.data(), input.sizes.size(), input.strides.data());
    input.data = files.empty() ? ones(info.scalar_type(), info.nbytes()) : contents(files.at(next++));
    ET_CHECK_MSG(
        input.data.size() == info.nbytes(),
        "Input %zu has %zu bytes, expected %zu",
        i,
        input.data.size(),
        info.nbytes());
    input.tensor = std::make_unique<TensorImpl>(
        info.scalar_type(),
        input.sizes.size(),
        input.sizes.data(),
        input.data.data(),
        input.order.data(),
        input.strides.data());
  }
  return inputs;
}

double milliseconds(et_timestamp_t ticks) {
  const auto ratio = pal_ticks_to_ns_multiplier();
  return static_cast<double>(ticks) * ratio.numerator / ratio.denominator / 1e6;
}

void print(size_t output, const Tensor& tensor, size_t most) {
  const size_t count = std::min<size_t>(tensor.numel(), most);
  for (size_t i = 0; i < count; ++i) {
    if (tensor.scalar_type() == ScalarType::Float) {
      std::printf("Output[%zu][%zu]: (float) %f\n", output, i, tensor.const_data_ptr<float>()[i]);
    } else if (tensor.scalar_type() == ScalarType::Int) {
      std::printf("Output[%zu][%zu]: (int) %d\n", output, i, tensor.const_data_ptr<int>()[i]);
    }
  }
}

} // namespace

int main(int argc, char** argv) {
  runtime_init();
  parse_options(argc, argv);
  const int threads = std::stoi(options["cpu_threads"]);
  if (threads > 0) {
    ET_LOG(Info, "Resetting threadpool with num threads = %d", threads);
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  }

  const std::string path = options["model_path"];
  const Loader loader(contents(path));
  const et_timestamp_t before_load = pal_current_ticks();
  Result<Program> program = Program::load(const_cast<Loader*>(&loader));
  if (!program.ok()) {
    ET_LOG(Error, "Failed to parse model file %s", path.c_str());
    return 1;
  }
  ET_LOG(Info, "Model file %s is loaded.", path.c_str());
  const char* name = program->get_method_name(0).get();
  ET_LOG(Info, "Using method %s", name);
  const MethodMeta meta = program->method_meta(name).get();

  std::vector<uint8_t> pool(64 << 20), scratch(64 << 20);
  MemoryAllocator allocator(pool.size(), pool.data()), temporary(scratch.size(), scratch.data());
  std::vector<std::vector<uint8_t>> planned;
  std::vector<Span<uint8_t>> spans;
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const size_t size = meta.memory_planned_buffer_size(i).get();
    ET_LOG(Info, "Setting up planned buffer %zu, size %zu.", i, size);
    planned.emplace_back(size);
    spans.emplace_back(planned.back().data(), size);
  }
  HierarchicalAllocator buffers({spans.data(), spans.size()});
  MemoryManager manager(&allocator, &buffers, &temporary);
  Result<Method> method = program->load_method(name, &manager);
  ET_CHECK_MSG(
      method.ok(),
      "Loading of method %s failed with status 0x%" PRIx32,
      name,
      static_cast<uint32_t>(method.error()));
  ET_LOG(Info, "Model loaded in %f ms.", milliseconds(pal_current_ticks() - before_load));

  const std::vector<Input> inputs = make_inputs(meta);
  const uint32_t runs = std::stoul(options["num_executions"]);
  et_timestamp_t spent = 0;
  for (uint32_t run = 0; run < runs; ++run) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].tensor) {
        ET_CHECK(method->set_input(EValue(Tensor(inputs[i].tensor.get())), i) == Error::Ok);
      }
    }
    const et_timestamp_t before = pal_current_ticks();
    const Error status = method->execute();
    const et_timestamp_t took = pal_current_ticks() - before;
    ET_CHECK_MSG(
        status == Error::Ok,
        "Execution of method %s failed with status 0x%" PRIx32,
        name,
        static_cast<uint32_t>(status));
    spent += took;
    ET_LOG(Info, "Iteration %" PRIu32 " of %" PRIu32 ": %f ms", run + 1, runs, milliseconds(took));
  }
  ET_LOG(
      Info,
      "Model executed successfully %" PRIu32 " time(s) in %f ms.",
      runs,
      milliseconds(spent));

  std::vector<EValue> outputs(method->outputs_size());
  ET_LOG(Info, "%zu outputs: ", outputs.size());
  ET_CHECK(method->get_outputs(outputs.data(), outputs.size()) == Error::Ok);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].isTensor()) {
      continue;
    }
    const Tensor tensor = outputs[i].toTensor();
    if (!options["output_file"].empty()) {
      const std::string file = options["output_file"] + "-" + std::to_string(i) + ".bin";
      ET_LOG(Info, "Writing output to file: %s", file.c_str());
      std::ofstream(file, std::ios::binary).write(tensor.const_data_ptr<char>(), tensor.nbytes());
    }
    if (options["print_output"] != "none") {
      print(i, tensor, options["print_output"] == "all" ? SIZE_MAX : 100);
    }
  }
  std::fflush(stdout);
  // Past the destructors of libraries that were made to end inside Python.
  std::_Exit(0);
}
