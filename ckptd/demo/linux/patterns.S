# patterns MIB RATE: fills MIB of memory with pages that say what they are, and checks each before it writes it anew.
#
# On PORT it takes commands, one to a line:
#
#   check       all pages are checked while none is written:  "ok ROUND PAGES"  or  "bad PAGE WHAT FOUND instead of WANTED"
#               (the first page that was wrong, now or earlier); "off" if MIB is 0
#   poweroff    "bye", and the machine is switched off
#
# One process, the writer, owns the memory, goes round its pages, RATE a second, and does the checking. What a command
# wants of it stands in a block that it shares with the processes of the connections. A page that is wrong is said on
# stderr, too, and from then on no page is written: what there is to see stays as it is.
#
# A page is 512 words of 8 bytes: 0 the magic number, 1 its own number, 2 the round that it was written in, counted
# from 1, 3 to 510 numbers that follow from these, 511 the checksum of all the others. So a page that is old, torn,
# mixed up or in the wrong place shows.

    .include "common.inc"
    .set PORT, CONTROL_PORT

    .set SYS_shutdown, 48
    .set SYS_sync, 162
    .set SYS_reboot, 169
    .set FUTEX_WAIT, 0
    .set FUTEX_WAKE, 1
    .set SHUT_WR, 1
    .set SO_RCVTIMEO, 20

    # the shared block
    .set ASKED, 0                       # checks that were asked for
    .set ANSWERED, 4                    # as many of them as have been done
    .set PAGES, 8
    .set ROUND, 16                      # that the writer was in at the last check
    .set WHAT, 24                       # 0: no page was wrong, else an index in `names`
    .set BAD, 32                        # that page's number
    .set FOUND, 40
    .set WANTED, 48

    # of a page, in bytes; their order is that of `names`
    .set NUMBER, 8
    .set WRITTEN_IN, 16
    .set FIRST_FILLER, 24
    .set CHECKSUM, 4088
    .set IS_MAGIC, 1
    .set IS_NUMBER, 2
    .set IS_ROUND, 3
    .set IS_CHECKSUM, 4

    .set K1, 0x9E3779B97F4A7C15         # odd and without a pattern, that is all
    .set K2, 0xC2B2AE3D27D4EB4F
    .set K3, 0x5851F42D4C957F2D

#   %r15  the shared block                     and in the writer:
#   %rbx  the first page                       %rbp  the number of the page that is next
#   %r12  the round that is being written      %r13  writes that are due

_start:
    argument 1, %rbp
    argument 2, %r12
    memory  $PAGE, SHARED
    movq    %rax, %r15
    imulq   $PAGES_PER_MIB, %rbp
    movq    %rbp, PAGES(%r15)
    testq   %rbp, %rbp
    jz      serve
    testq   %r12, %r12
    jz      serve
    sys     fork
    testl   %eax, %eax
    jnz     serve

    shlq    $12, %rbp
    memory  %rbp, PRIVATE
    movq    %rax, %rbx
    movq    %r12, %rdi
    call    start_pace
    movl    $1, %r12d

    xorl    %ebp, %ebp                  # the first round at full speed
1:  call    write_page
    incq    %rbp
    cmpq    PAGES(%r15), %rbp
    jb      1b
    xorl    %r13d, %r13d

round:
    incq    %r12
    xorl    %ebp, %ebp

page:
    movl    ASKED(%r15), %eax
    cmpl    ANSWERED(%r15), %eax
    je      1f
    call    check_all
1:  testq   %r13, %r13
    jnz     2f
    call    due
    movq    %rax, %r13
    jmp     page
2:  decq    %r13
    movq    %rbp, %rdi
    leaq    -1(%r12), %rsi
    call    check_page
    call    write_page
    incq    %rbp
    cmpq    PAGES(%r15), %rbp
    jb      page
    jmp     round

# --- the writer's work

# %rsi: page number %rdi.
.macro find_page
    movq    %rdi, %rsi
    shlq    $12, %rsi
    addq    %rbx, %rsi
.endm

# The checksum so far, %rax, takes in one more word.
.macro take_in word
    xorq    \word, %rax
    rolq    $23, %rax
    imulq   %r9, %rax
.endm

# Page %rbp as it must be in round %r12.
write_page:
    movq    %rbp, %rdi
    find_page
    movabsq $K1, %r8
    movabsq $K2, %r9
    movabsq $K3, %r10
    movabsq $PATTERNS_MAGIC, %rdx
    xorl    %eax, %eax
    movq    %rdx, (%rsi)
    take_in %rdx
    movq    %rbp, NUMBER(%rsi)
    take_in %rbp
    movq    %r12, WRITTEN_IN(%rsi)
    take_in %r12
    movq    %rax, %rdx                  # what all the rest follows from
    movl    $FIRST_FILLER, %ecx
1:  imulq   %r8, %rdx
    addq    %r10, %rdx
    movq    %rdx, (%rsi, %rcx)
    take_in %rdx
    addl    $8, %ecx
    cmpl    $CHECKSUM, %ecx
    jb      1b
    movq    %rax, CHECKSUM(%rsi)
    ret

# Page %rdi must have been written in round %rsi. Does not come back if it was not.
check_page:
    movq    %rsi, %r10
    find_page
    movl    $IS_MAGIC, %r8d
    movabsq $PATTERNS_MAGIC, %rdx
    movq    (%rsi), %rcx
    cmpq    %rdx, %rcx
    jne     wrong
    movl    $IS_NUMBER, %r8d
    movq    %rdi, %rdx
    movq    NUMBER(%rsi), %rcx
    cmpq    %rdx, %rcx
    jne     wrong
    movl    $IS_ROUND, %r8d
    movq    %r10, %rdx
    movq    WRITTEN_IN(%rsi), %rcx
    cmpq    %rdx, %rcx
    jne     wrong
    movl    $IS_CHECKSUM, %r8d
    movabsq $K2, %r9
    xorl    %eax, %eax
    xorl    %ecx, %ecx
1:  take_in "(%rsi, %rcx)"
    addl    $8, %ecx
    cmpl    $CHECKSUM, %ecx
    jb      1b
    movq    %rax, %rdx
    movq    CHECKSUM(%rsi), %rcx
    cmpq    %rdx, %rcx
    jne     wrong
    ret

# Checks all pages: those before %rbp are of this round already, the others of the one before.
check_all:
    movl    ASKED(%r15), %r14d          # who asks from now on may mean a page that we are past
    xorl    %edi, %edi
1:  movq    %r12, %rsi
    cmpq    %rbp, %rdi
    jb      2f
    decq    %rsi
2:  call    check_page
    incq    %rdi
    cmpq    PAGES(%r15), %rdi
    jb      1b
    movq    %r12, ROUND(%r15)

# All checks up to number %r14 are done: who waits may look.
tell:
    movl    %r14d, ANSWERED(%r15)
    leaq    ANSWERED(%r15), %rdi
    movl    $FUTEX_WAKE, %esi
    movl    $0x7fffffff, %edx           # all of them
    sys     futex
    ret

# Page %rdi has %rcx where %rdx should be; %r8 says what that is. Nothing is written any more.
wrong:
    movq    %rdi, BAD(%r15)
    movq    %rcx, FOUND(%r15)
    movq    %rdx, WANTED(%r15)
    movq    %r8, WHAT(%r15)
    leaq    output(%rip), %rdi
    put_text "patterns: "
    call    put_bad
    leaq    output(%rip), %rsi
    movq    %rdi, %rdx
    subq    %rsi, %rdx
    movl    $STDERR, %edi
    sys     write
1:  movl    ASKED(%r15), %r14d
    call    tell
    leaq    ASKED(%r15), %rdi           # until somebody asks again
    movl    $FUTEX_WAIT, %esi
    movl    %r14d, %edx
    xorl    %r10d, %r10d
    sys     futex
    jmp     1b

# "bad PAGE WHAT FOUND instead of WANTED\n" to (%rdi), which goes past it.
put_bad:
    put_text "bad "
    movq    BAD(%r15), %rax
    call    put_decimal
    put_byte ' '
    movq    WHAT(%r15), %rax
    leaq    names(%rip), %rsi
    shll    $4, %eax
    addq    %rax, %rsi
1:  lodsb                               # up to its space, and that, too
    stosb
    cmpb    $' ', %al
    jne     1b
    movq    FOUND(%r15), %rax
    call    put_decimal
    put_text " instead of "
    movq    WANTED(%r15), %rax
    call    put_decimal
    put_byte '\n'
    ret

# --- the commands, in the process of a connection

# Goes to `there` if the line is this one.
.macro if_line text, there
    cmpq    $807f - 806f, %r13
    jne     808f
    leaq    line(%rip), %rsi
    leaq    806f(%rip), %r8
    movl    $807f - 806f, %ecx
    xchgq   %rdi, %r8
    repe cmpsb
    movq    %r8, %rdi
    je      \there
808:
    .section .rodata
806: .ascii "\text"
807:
    .text
.endm

answer:
    if_line "check", check
    if_line "poweroff", power_off
    put_text "unknown: the commands are check and poweroff\n"
    ret

check:
    cmpq    $0, PAGES(%r15)
    jne     1f
    put_text "off\n"
    ret
1:  pushq   %rdi
    movl    $1, %eax
    lock xaddl %eax, ASKED(%r15)
    leal    1(%rax), %r13d              # our number; the line is not needed any more
    leaq    ASKED(%r15), %rdi           # the writer waits here if a page was wrong
    movl    $FUTEX_WAKE, %esi
    movl    $1, %edx
    sys     futex
2:  movl    ANSWERED(%r15), %edx
    movl    %edx, %eax
    subl    %r13d, %eax
    jns     3f
    leaq    ANSWERED(%r15), %rdi
    movl    $FUTEX_WAIT, %esi
    xorl    %r10d, %r10d
    sys     futex
    jmp     2b
3:  popq    %rdi
    cmpq    $0, WHAT(%r15)
    jne     put_bad
    put_text "ok "
    movq    ROUND(%r15), %rax
    call    put_decimal
    put_byte ' '
    movq    PAGES(%r15), %rax
    call    put_decimal
    put_byte '\n'
    ret

# The client first reads our last words and hangs up, if it does so soon: its output may be held for a while.
power_off:
    put_text "bye\n"
    movq    %rdi, %r14
    call    write_all
    movl    %ebx, %edi
    movl    $SHUT_WR, %esi
    sys     shutdown
    movl    %ebx, %edi
    movl    $SOL_SOCKET, %esi
    movl    $SO_RCVTIMEO, %edx
    leaq    patience(%rip), %r10
    movl    $16, %r8d
    sys     setsockopt
    movl    %ebx, %edi
    leaq    input(%rip), %rsi
    movl    $INPUT_MAX, %edx
    sys     read
    sys     sync
    movl    $0xfee1dead, %edi           # the numbers that reboot(2) wants to see
    movl    $0x28121969, %esi
    movl    $0x4321fedc, %edx           # LINUX_REBOOT_CMD_POWER_OFF
    sys     reboot
    jmp     hang_up

    .include "pace.inc"
    .include "server.inc"

    .section .rodata
names:                                  # 16 bytes each
    .ascii  "                ", "magic           ", "number          ", "round           ", "checksum        "
    .balign 8
patience: .quad 1, 0                    # 1 s
