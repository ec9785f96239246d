# say RATE: writes RATE lines a second, "say 1", "say 2" and so on, for ever. A lost or doubled byte of output shows.

    .include "common.inc"

_start:
    argument 1, %rdi
    testq   %rdi, %rdi
    jz      nothing
    call    start_pace
    xorl    %ebx, %ebx                  # the last number said

ask:
    call    due
    movq    %rax, %r13
    testq   %rax, %rax
    jz      ask

1:  leaq    text(%rip), %rdi
    put_text "say "
    incq    %rbx
    movq    %rbx, %rax
    call    put_decimal
    put_byte '\n'
    leaq    text(%rip), %rsi
    movq    %rdi, %rdx
    subq    %rsi, %rdx
    movl    $STDOUT, %edi
    sys     write
    decq    %r13
    jnz     1b
    jmp     ask

nothing:
    exit    0

    .include "pace.inc"

    .bss
text: .skip 32
    .text
