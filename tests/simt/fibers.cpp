#include "fibers.h"

#include <new>

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

namespace {

namespace context = boost::context::detail;

constexpr size_t kPage = 4096;
constexpr size_t kColours = 61;          // how many different places a stack may start at
constexpr size_t kColourBytes = 7 * 64;  // an odd number of cache lines
constexpr size_t kStack = size_t{96} << 10;

// What is handed over at a switch: who was left, and who goes on.
struct Handover {
  Fiber* left;
  Fiber* next;
};

}  // namespace

Fiber::Fiber() {
#ifdef __SANITIZE_THREAD__
  tsan_fiber_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(int number) {
  void* mapped = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(mapped);
  mprotect(mapping_, kPage, PROT_NONE);
  top_ = mapping_ + kPage + kStack - static_cast<size_t>(number) % kColours * kColourBytes;
  stack_bottom_ = mapping_ + kPage;
  stack_size_ = static_cast<size_t>(top_ - mapping_) - kPage;
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#ifdef __SANITIZE_THREAD__
  if (tsan_fiber_ != nullptr) __tsan_destroy_fiber(tsan_fiber_);
#endif
  munmap(mapping_, kPage + kStack);
}

void Fiber::restart(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  context_ = context::make_fcontext(top_, stack_size_, &Fiber::start);
  fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_bottom_, stack_size_);
#endif
#ifdef __SANITIZE_THREAD__
  if (tsan_fiber_ != nullptr) __tsan_destroy_fiber(tsan_fiber_);
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

void Fiber::before_switch([[maybe_unused]] Fiber& self) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&self.fake_stack_, stack_bottom_, stack_size_);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(tsan_fiber_, 0);
#endif
}

// On the fiber that goes on.
void Fiber::after_switch([[maybe_unused]] Fiber& left) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &left.stack_bottom_, &left.stack_size_);
#endif
}

void Fiber::switch_from(Fiber& self) {
  Handover handover{&self, this};
  before_switch(self);
  const context::transfer_t back = context::jump_fcontext(context_, &handover);
  Fiber& left = *static_cast<Handover*>(back.data)->left;
  left.context_ = back.fctx;
  self.after_switch(left);
}

void Fiber::start(context::transfer_t from) {
  const Handover handover = *static_cast<Handover*>(from.data);
  handover.left->context_ = from.fctx;
  handover.next->after_switch(*handover.left);
  handover.next->entry_(handover.next->argument_);
}

bool Fiber::guards(const void* address) const {
  return mapping_ != nullptr && address >= mapping_ && address < mapping_ + kPage;
}

}  // namespace simt
