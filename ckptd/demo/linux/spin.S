# spin: one process counts as fast as it can; each line is answered with how far it has come.
#
# Asked twice, from outside and by a clock outside, it says how much computing the guest gets done in a second.

    .include "common.inc"
    .set PORT, SPIN_PORT
    .set STEPS, 1000                    # in registers, so that the loop does not measure memory

_start:
    memory  $PAGE, SHARED
    movq    %rax, %r15
    sys     fork
    testl   %eax, %eax
    jnz     serve

count:
    movl    $STEPS, %ecx
1:  decl    %ecx
    jnz     1b
    addq    $STEPS, (%r15)
    jmp     count

answer:
    movq    (%r15), %rax
    call    put_decimal
    put_byte '\n'
    ret

    .include "server.inc"
