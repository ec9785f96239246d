# dirty RATE MIB: writes to RATE pages a second, which chance picks out of MIB of memory, for ever.

    .include "common.inc"

#   %rbx  the memory       %rbp  its pages       %r12  state of the random numbers       %r13  writes that are due

_start:
    argument 1, %r14
    argument 2, %rbp
    testq   %r14, %r14
    jz      nothing
    imulq   $PAGES_PER_MIB, %rbp
    jz      nothing
    movq    %rbp, %rax
    shlq    $12, %rax
    memory  %rax, PRIVATE
    movq    %rax, %rbx

    movq    %rbp, %rcx                  # each page is there before the first round: from then on the rate is the rate
    movq    %rbx, %rdi
1:  movb    $1, (%rdi)
    addq    $PAGE, %rdi
    decq    %rcx
    jnz     1b

    movq    %r14, %rdi
    call    start_pace
    movabsq $0x9E3779B97F4A7C15, %r12

ask:
    call    due
    movq    %rax, %r13
    testq   %rax, %rax
    jz      ask

touch:
    movq    %r12, %rax                  # xorshift64: three shifts that run through all numbers but 0
    shlq    $13, %rax
    xorq    %rax, %r12
    movq    %r12, %rax
    shrq    $7, %rax
    xorq    %rax, %r12
    movq    %r12, %rax
    shlq    $17, %rax
    xorq    %rax, %r12
    movq    %r12, %rax
    mulq    %rbp                        # %rdx: a number from 0 to pages - 1
    shlq    $12, %rdx
    incq    (%rbx, %rdx)
    decq    %r13
    jnz     touch
    jmp     ask

nothing:
    exit    0

    .include "pace.inc"
