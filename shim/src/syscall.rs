//! libc's `syscall`, for programs that make System V calls through it.
//!
//! It is written in assembly, as glibc's own is: everything but our twelve calls must pass through
//! with registers and stack exactly as glibc would leave them, also where the call returns twice
//! or on another stack (`clone`), and at no cost. Hence no `hook!`, whose frame would show.

use libc::{c_int, c_long};
use migshm_protocol::call::Errno;

use crate::hooks::enter;
use crate::{msg, sem, shm};

/// Bit that some C libraries add to a command to ask for the structures of today
/// (`IPC_64`); they are the only ones on x86-64.
const IPC_64: c_int = 0x100;

/// `syscall(2)`.
///
/// Seven arguments are read whatever the call needs, the last from the stack.
///
/// # Safety
/// That of the system call.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    core::arch::naked_asm!(
        // shmget, shmat, shmctl: 29..=31
        "lea eax, [rdi - {shmget}]",
        "cmp eax, 2",
        "jbe 3f",
        // semget, semop, semctl, shmdt, msgget, msgsnd, msgrcv, msgctl: 64..=71
        "lea eax, [rdi - {semget}]",
        "cmp eax, 7",
        "jbe 3f",
        "cmp edi, {semtimedop}",
        "je 3f",
        // As glibc: shift the arguments, enter the kernel.
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 2f",
        "ret",
        // -4095..=-1 is a negated errno.
        "2:",
        "push rax",
        "call {errno_location}@PLT",
        "pop rcx",
        "neg ecx",
        "mov [rax], ecx",
        "mov rax, -1",
        "ret",
        "3:",
        "jmp {dispatch}",
        shmget = const libc::SYS_shmget,
        semget = const libc::SYS_semget,
        semtimedop = const libc::SYS_semtimedop,
        errno_location = sym libc::__errno_location,
        dispatch = sym dispatch,
    )
}

const _: () = {
    assert!(libc::SYS_shmat == libc::SYS_shmget + 1 && libc::SYS_shmctl == libc::SYS_shmget + 2);
    assert!(libc::SYS_semop == libc::SYS_semget + 1 && libc::SYS_semctl == libc::SYS_semget + 2);
    assert!(libc::SYS_shmdt == libc::SYS_semget + 3 && libc::SYS_msgget == libc::SYS_semget + 4);
    assert!(libc::SYS_msgsnd == libc::SYS_semget + 5 && libc::SYS_msgrcv == libc::SYS_semget + 6);
    assert!(libc::SYS_msgctl == libc::SYS_semget + 7);
};

/// The System V calls, as the kernel reads their registers: an `int` is the lower half.
extern "C" fn dispatch(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
) -> c_long {
    let value = enter(|| match c_long::from(number as c_int) {
        libc::SYS_shmget => shm::get(a as c_int, b as usize, c as c_int),
        libc::SYS_shmat => shm::attach(a as c_int, b as usize, c as c_int),
        libc::SYS_shmdt => shm::detach(a as usize),
        libc::SYS_shmctl => shm::control(a as c_int, b as c_int & !IPC_64, c as usize),
        libc::SYS_semget => sem::get(a as c_int, b as c_int, c as c_int),
        libc::SYS_semop => sem::operate(a as c_int, b as usize, c as u32 as usize, 0),
        libc::SYS_semtimedop => sem::operate(a as c_int, b as usize, c as u32 as usize, d as usize),
        libc::SYS_semctl => sem::control(a as c_int, b as c_int, c as c_int & !IPC_64, d as usize),
        libc::SYS_msgget => msg::get(a as c_int, b as c_int),
        libc::SYS_msgsnd => msg::send(a as c_int, b as usize, c as usize, d as c_int),
        libc::SYS_msgrcv => msg::receive(a as c_int, b as usize, c as usize, d, e as c_int),
        libc::SYS_msgctl => msg::control(a as c_int, b as c_int & !IPC_64, c as usize),
        _ => Err(Errno::ENOSYS),
    });
    value as c_long
}
