#pragma once

#include <cstddef>

#include <boost/context/detail/fcontext.hpp>

namespace simt {

/// A stack that a function can leave halfway and come back to. Sanitizers are told of every switch.
class Fiber {
 public:
  /// Runs on the fiber when it is first switched to, and never returns.
  using Entry = void (*)(void* argument);

  /// The stack that the caller runs on; belongs to the calling host thread.
  Fiber();

  /// A stack of its own. `number` tells fibers apart: their hot lines fall into different sets of a cache.
  explicit Fiber(int number);

  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Forgets what the fiber was doing; its next turn starts `entry`. Nothing on its stack is destroyed.
  void restart(Entry entry, void* argument);

  /// Leaves `self`, the running fiber, and goes on with this one. Returns when somebody switches to `self`.
  void switch_from(Fiber& self);

  /// Whether the address lies in the page below the stack: a function needed more than there is.
  bool guards(const void* address) const;

 private:
  static void start(boost::context::detail::transfer_t from);
  void before_switch(Fiber& self);
  void after_switch(Fiber& left);

  boost::context::detail::fcontext_t context_ = nullptr;
  std::byte* mapping_ = nullptr;  ///< null where the stack is a host thread's
  std::byte* top_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  // The sanitizers' own.
  const void* stack_bottom_ = nullptr;
  size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
};

}  // namespace simt
