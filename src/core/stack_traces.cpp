#include "normformer/core/stack_traces.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <thread>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <execinfo.h>
#include <fmt/ranges.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"

namespace normformer {

namespace {

int trace_signal() { return SIGRTMIN + 5; }

// A question to one thread, answered by its signal handler.
struct Question {
  enum State : int { asked, taken, answered, withdrawn };
  pid_t thread = 0;
  std::atomic<int> state{asked};
  std::array<void*, 64> frames{};
  int count = 0;
};

std::atomic<Question*> open_question{nullptr};

pid_t this_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// Only what a handler may do: backtrace was called before, and does not allocate any more.
extern "C" void answer_question(int) {
  const int kept_errno = errno;
  Question* question = open_question.load(std::memory_order_acquire);
  int expected = Question::asked;
  if (question != nullptr && question->thread == this_thread() &&
      question->state.compare_exchange_strong(expected, Question::taken)) {
    question->count = backtrace(question->frames.data(), static_cast<int>(question->frames.size()));
    question->state.store(Question::answered, std::memory_order_release);
  }
  errno = kept_errno;
}

// Which function of this program an address is in, by the program's own table of symbols: the dynamic one
// does not have functions that are local to a file.
class ProgramSymbols {
 public:
  ProgramSymbols() {
    try {
      file_.emplace(std::filesystem::read_symlink("/proc/self/exe"));
      read(file_->bytes());
    } catch (const std::exception&) {
      functions_.clear();  // a program that was replaced or stripped: places in the file remain
    }
  }

  // The mangled name; null where it is not known.
  const char* find(uint64_t address) const {
    const auto after = std::upper_bound(functions_.begin(), functions_.end(), address,
                                        [](uint64_t a, const Function& f) { return a < f.begin; });
    if (after == functions_.begin()) return nullptr;
    const Function& found = *(after - 1);
    return address < found.end ? found.name : nullptr;
  }

 private:
  struct Function {
    uint64_t begin;
    uint64_t end;
    const char* name;
  };

  template <class T>
  static std::span<const T> part(std::span<const std::byte> bytes, uint64_t offset, uint64_t count) {
    if (offset > bytes.size() || count > (bytes.size() - offset) / sizeof(T) || offset % alignof(T) != 0)
      throw DataError("not a sound program file");
    return {reinterpret_cast<const T*>(bytes.data() + offset), count};
  }

  void read(std::span<const std::byte> bytes) {
    const Elf64_Ehdr& header = part<Elf64_Ehdr>(bytes, 0, 1)[0];
    const auto sections = part<Elf64_Shdr>(bytes, header.e_shoff, header.e_shnum);
    for (const Elf64_Shdr& section : sections) {
      if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
      const Elf64_Shdr& strings = sections[section.sh_link];
      const auto names = part<char>(bytes, strings.sh_offset, strings.sh_size);
      if (names.empty() || names.back() != 0) continue;
      for (const Elf64_Sym& symbol :
           part<Elf64_Sym>(bytes, section.sh_offset, section.sh_size / sizeof(Elf64_Sym))) {
        if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_size == 0) continue;
        if (symbol.st_name >= names.size()) continue;
        functions_.push_back(
            {symbol.st_value, symbol.st_value + symbol.st_size, names.data() + symbol.st_name});
      }
    }
    std::sort(functions_.begin(), functions_.end(),
              [](const Function& a, const Function& b) { return a.begin < b.begin; });
  }

  std::optional<MappedFile> file_;
  std::vector<Function> functions_;
};

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? text.get() : name;
}

// One line for one frame. A return address is behind its call, which may have been a function's last act.
std::string describe_frame(const ProgramSymbols& symbols, void* frame, bool is_return) {
  const auto address = reinterpret_cast<uintptr_t>(frame) - (is_return ? 1 : 0);
  Dl_info info{};
  link_map* map = nullptr;
  if (dladdr1(reinterpret_cast<void*>(address), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0)
    return fmt::format("{:#x}", address);
  const uintptr_t offset = address - map->l_addr;
  const bool is_program = map->l_name[0] == 0;
  const char* name = is_program ? symbols.find(offset) : info.dli_sname;
  const std::string file = std::filesystem::path(info.dli_fname).filename().string();
  return fmt::format("{} ({}+{:#x})", name == nullptr ? "?" : demangled(name), file, offset);
}

std::string first_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

struct ThreadStack {
  pid_t thread = 0;
  std::string name;
  char state = '?';
  std::vector<void*> frames;  // innermost first; empty where the thread did not answer
};

ThreadStack described_thread(pid_t thread) {
  const std::filesystem::path folder = fmt::format("/proc/self/task/{}", thread);
  const std::string stat = first_line(folder / "stat");
  const size_t name_end = stat.rfind(") ");  // proc(5): the state follows the name
  const char state = name_end == std::string::npos ? '?' : stat[name_end + 2];
  return {.thread = thread, .name = first_line(folder / "comm"), .state = state, .frames = {}};
}

void wait_for_answer(const Question& question, std::chrono::milliseconds most) {
  const auto deadline = std::chrono::steady_clock::now() + most;
  while (question.state.load(std::memory_order_acquire) != Question::answered &&
         std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// The frames of a thread above those of the signal and its handler. A question that a handler has taken but
// not answered stays for ever: nobody else may touch it.
std::vector<void*> frames_of(pid_t thread) {
  constexpr auto kPatience = std::chrono::milliseconds(200);
  auto question = std::make_unique<Question>();
  question->thread = thread;
  open_question.store(question.get(), std::memory_order_release);
  if (syscall(SYS_tgkill, getpid(), thread, trace_signal()) == 0) wait_for_answer(*question, kPatience);
  int expected = Question::asked;
  if (!question->state.compare_exchange_strong(expected, Question::withdrawn) &&
      expected != Question::answered)
    wait_for_answer(*question, kPatience);
  open_question.store(nullptr, std::memory_order_release);
  if (question->state.load(std::memory_order_acquire) != Question::answered) {
    static_cast<void>(question.release());
    return {};
  }
  constexpr int kOfHandler = 2;  // answer_question and what the system returns to from it
  const auto begin = question->frames.begin();
  return std::vector<void*>(begin + std::min(kOfHandler, question->count), begin + question->count);
}

std::vector<ThreadStack> stacks_of_threads(std::string_view left_out) {
  std::vector<ThreadStack> stacks;
  std::error_code error;
  for (std::filesystem::directory_iterator task("/proc/self/task", error), end; !error && task != end;
       task.increment(error)) {
    const auto thread = static_cast<pid_t>(std::atoi(task->path().filename().c_str()));
    ThreadStack stack = described_thread(thread);
    if (thread == this_thread() || (!left_out.empty() && stack.name == left_out)) continue;
    stack.frames = frames_of(thread);
    stacks.push_back(std::move(stack));
  }
  return stacks;
}

std::string_view name_of_state(char state) {
  switch (state) {
    case 'R':
      return "running";
    case 'S':
      return "asleep";
    case 'D':
      return "waiting for a disk or another device";
    case 'T':
    case 't':
      return "stopped";
    default:
      return "in an unknown state";
  }
}

}  // namespace

void prepare_stack_traces() {
  std::array<void*, 4> frames{};
  backtrace(frames.data(), static_cast<int>(frames.size()));  // loads the unwinder
  struct sigaction action {};
  action.sa_handler = answer_question;
  action.sa_flags = SA_RESTART;
  NF_CHECK(sigaction(trace_signal(), &action, nullptr) == 0, "cannot take signal {}: {}", trace_signal(),
           system_reason());
}

std::string stack_traces(std::string_view left_out) {
  const std::vector<ThreadStack> stacks = stacks_of_threads(left_out);
  const ProgramSymbols symbols;
  std::string text;
  std::set<size_t> told;
  for (size_t i = 0; i < stacks.size(); ++i) {
    if (told.contains(i)) continue;
    const ThreadStack& stack = stacks[i];
    std::vector<pid_t> alike;
    for (size_t j = i; j < stacks.size(); ++j) {
      if (stacks[j].frames != stack.frames || stacks[j].name != stack.name) continue;
      alike.push_back(stacks[j].thread);
      told.insert(j);
    }
    text +=
        fmt::format("thread{} {} ({}), {}{}\n", alike.size() == 1 ? "" : "s", fmt::join(alike, ", "),
                    stack.name, name_of_state(stack.state), stack.frames.empty() ? ", gave no answer" : "");
    for (size_t f = 0; f < stack.frames.size(); ++f)
      text += fmt::format("  #{:<2} {}\n", f, describe_frame(symbols, stack.frames[f], f > 0));
  }
  return text;
}

}  // namespace normformer
