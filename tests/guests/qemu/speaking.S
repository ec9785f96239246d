# A guest in 64 KiB of ROM that says numbered lines on a serial port for ever: 00000001, 00000002, ...
#
# 16 bits. The line is in RAM at 0x600, its number counted up there in decimal; where in it the guest is, is in a
# register: so lines go on right only if memory and registers are of one moment.
#
# The words at the start are put there by speaking.py.

        .set    LINE, 0x600
        .set    RAM, 0x800              # a segment

        .text
        .code16
        .globl  _start
_start:
port:   .long   0x3f8
rest:   .long   20000                   # rounds of doing nothing after each line

real:   cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        cld
        mov     $RAM, %ax               # there all goes on: a standby's ROM is empty
        mov     %ax, %es
        xor     %si, %si
        xor     %di, %di
        mov     $0x100, %cx
        rep movsw %cs:(%si), %es:(%di)
        ljmp    $RAM, $inside - _start
inside: xor     %ax, %ax
        mov     %ax, %es
        mov     $LINE, %di
        mov     $8, %cx
        mov     $'0', %al
        rep stosb
        mov     $10, %al
        stosb
1:      mov     $LINE + 7, %bx
2:      incb    (%bx)
        cmpb    $'9', (%bx)
        jbe     3f
        movb    $'0', (%bx)
        dec     %bx
        jmp     2b
3:      mov     $LINE, %si
4:      mov     %cs:port - _start, %dx
        add     $5, %dx
5:      in      %dx, %al                # until it takes a byte
        test    $0x20, %al
        jz      5b
        sub     $5, %dx
        lodsb
        out     %al, %dx
        cmp     $10, %al
        jne     4b
        mov     %cs:rest - _start, %ecx
6:      dec     %ecx
        jnz     6b
        jmp     1b

        .org    0xfff0
        ljmp    $0xf000, $real - _start
        .org    0x10000
