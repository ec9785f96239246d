# A guest that comes in 64 KiB of ROM, and copies itself into RAM: counts in a register and in memory, writes pages, and sends numbered packets.
#
# 32 bits, flat. Everything happens on the ticks of the timer; between them the CPU halts. Each tick makes `steps` steps:
#
#   the counter in memory must be that in ebx       else `faults` counts
#   both get one more, and one of `pages` pages from 2 MiB on, which chance picks, gets the counter
#   every `every` steps (0: never): a packet of 60 bytes to ne2k_isa at 0x300, with its number at byte 14
#
# The words at `parameters` are put there by programs.py.

        .set    WORDS, 0x100000         # counter, faults, packets, ticks
        .set    PAGES, 0x200000
        .set    NIC, 0x300

        .text
        .code32
        .globl  _start
        .set    ROM, 0xf0000
_start:                                 # in RAM, to which it is linked
parameters:
pages:  .long   64
steps:  .long   20
every:  .long   0
size:   .long   60
rate:   .long   1193                    # of the timer's 1,193,182 Hz: about 1,000 ticks a second

        .align  8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # code, flat
        .quad   0x00cf93000000ffff      # data, flat
gdtr:   .word   . - gdt - 1
        .long   gdt
early:  .word   gdtr - gdt - 1
        .long   ROM + gdt - _start
idtr:   .word   8 * 0x21 - 1
        .long   IDT
        .set    IDT, 0x8000

protected:
        mov     $0x10, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7000, %esp
        cld
        mov     $ROM, %esi
        mov     $_start, %edi
        mov     $0x4000, %ecx
        rep movsl
        mov     $inside, %eax
        jmp     *%eax
inside: lgdtl   gdtr
        # the timer's interrupt is 0x20
        mov     $tick, %eax
        movw    %ax, IDT + 8 * 0x20
        movw    $8, IDT + 8 * 0x20 + 2
        movw    $0x8e00, IDT + 8 * 0x20 + 4
        shr     $16, %eax
        movw    %ax, IDT + 8 * 0x20 + 6
        lidt    idtr
        movl    $0x1ff, 0xfee000f0      # the APIC lets the PIC's interrupts pass
        movl    $0x700, 0xfee00350
        mov     $0x11, %al
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x20, %al
        out     %al, $0x21
        mov     $0x28, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $1, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfe, %al              # the timer only
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1
        mov     $0x34, %al              # channel 0, mode 2
        out     %al, $0x43
        mov     rate, %eax
        out     %al, $0x40
        mov     %ah, %al
        out     %al, $0x40
        cmpl    $0, every
        je      1f
        call    nic
1:      xor     %ebx, %ebx              # the counter
        mov     %ebx, WORDS             # which a reset has left there
        mov     $12345, %ebp            # chance
        mov     every, %esi
2:      sti
        hlt
        jmp     2b
tick:   add     $12, %esp               # no iret: an emulating KVM lacks it
        incl    WORDS + 12
        mov     $0x20, %al
        out     %al, $0x20
        mov     steps, %ecx
3:      cmp     %ebx, WORDS
        je      4f
        incl    WORDS + 4
4:      inc     %ebx
        mov     %ebx, WORDS
        imul    $1664525, %ebp, %ebp
        add     $1013904223, %ebp
        mov     %ebp, %eax
        shr     $8, %eax
        xor     %edx, %edx
        divl    pages
        shl     $12, %edx
        mov     %ebx, PAGES(%edx)
        dec     %esi
        jnz     5f
        mov     every, %esi
        call    send
5:      dec     %ecx
        jnz     3b
        jmp     2b

nic:    mov     $0x21, %al              # stop
        mov     $NIC, %dx
        out     %al, %dx
        lea     table, %edi
1:      movzbl  (%edi), %edx
        cmp     $0xff, %dl
        je      2f
        add     $NIC, %edx
        mov     1(%edi), %al
        out     %al, %dx
        add     $2, %edi
        jmp     1b
2:      mov     $PACKET, %edi           # a broadcast of type 0x88b5, with zeros
        movl    $0xffffffff, (%edi)
        movl    $0x0052ffff, 4(%edi)
        movl    $0x12005452, 8(%edi)
        movw    $0xb588, 12(%edi)
        ret
        .set    PACKET, 0x9000

send:   test    %esi, %esi              # every is 0: it counts down from 2^32
        js      2f
        push    %ecx
        incl    WORDS + 8
        mov     WORDS + 8, %eax
        mov     %eax, PACKET + 14
        mov     %ebx, PACKET + 18
        mov     $NIC + 8, %edx          # where in the card's memory
        xor     %eax, %eax
        out     %al, %dx
        inc     %edx
        mov     $0x40, %al
        out     %al, %dx
        mov     size, %eax
        inc     %edx                    # how much
        out     %al, %dx
        inc     %edx
        xchg    %al, %ah
        out     %al, %dx
        mov     $NIC, %edx              # take it
        mov     $0x12, %al
        out     %al, %dx
        push    %esi
        mov     $PACKET, %esi
        mov     size, %ecx
        shr     $1, %ecx
        mov     $NIC + 16, %edx
        rep outsw
        pop     %esi
        mov     $NIC + 4, %edx          # and send it
        mov     $0x40, %al
        out     %al, %dx
        mov     size, %eax
        inc     %edx
        out     %al, %dx
        inc     %edx
        xchg    %al, %ah
        out     %al, %dx
        mov     $NIC, %edx
        mov     $0x26, %al
        out     %al, %dx
        pop     %ecx
2:      ret

table:  .byte   0x0e, 0x49, 0x0c, 0x04, 0x0d, 0x00, 0x01, 0x46, 0x02, 0x80, 0x03, 0x46, 0x07, 0xff, 0x0f, 0x00
        .byte   0x00, 0x22, 0xff

        .org    0xff00
        .code16
real:   cli
        lgdtl   %cs:(early - _start)
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $(ROM + protected - _start)

        .org    0xfff0
        jmp     real
        .org    0x10000
