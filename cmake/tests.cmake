# Tests: one Criterion binary per room, stress, sim and bench programs with a main of their own, fuzz targets, and the
# checks over the source text. Labels: unit, stress, sim, lint.

set(repfs_rooms repfs_fuse repfs_daemon repfs_image repfs_net repfs_os repfs_core)
if(REPFS_SANITIZE)
	# An ASan leak report alone would leave Criterion's exit code at 0.
	set(sanitizer_env "ASAN_OPTIONS=abort_on_error=1" "UBSAN_OPTIONS=print_stacktrace=1" "TSAN_OPTIONS=halt_on_error=1")
endif()

# Helpers of several tests. Files with a main are programs for the e2e tests.
file(GLOB testlib_sources CONFIGURE_DEPENDS tests/lib/*.c)
set(testlib_programs "")
foreach(source IN LISTS testlib_sources)
	file(STRINGS ${source} has_main REGEX "^int main\\(")
	if(has_main)
		list(APPEND testlib_programs ${source})
	endif()
endforeach()
if(testlib_programs)
	list(REMOVE_ITEM testlib_sources ${testlib_programs})
endif()
repfs_library(repfs_testlib SOURCES ${testlib_sources} LINKS Threads::Threads)

# repfs_programs(OUT_LIST SOURCES...): each source is one executable of its own name over all rooms.
function(repfs_programs out)
	set(made "")
	foreach(source IN LISTS ARGN)
		cmake_path(GET source STEM name)
		add_executable(${name} ${source})
		repfs_link(${name} repfs_flags repfs_testlib ${repfs_rooms} Threads::Threads)
		list(APPEND made ${name})
	endforeach()
	set(${out} ${made} PARENT_SCOPE)
endfunction()

function(repfs_test_properties name label timeout_s)
	set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT ${timeout_s} ENVIRONMENT "${sanitizer_env}")
endfunction()

repfs_programs(helpers ${testlib_programs})

# Criterion runs each test in a forked process, which ThreadSanitizer does not follow.
if(tsan_at EQUAL -1)
	if(REPFS_REQUIRE_TESTS)
		pkg_check_modules(CRITERION REQUIRED IMPORTED_TARGET criterion)
	else()
		pkg_check_modules(CRITERION IMPORTED_TARGET criterion)
	endif()
	if(CRITERION_FOUND AND NOT REPFS_FUZZ)
		foreach(room core image net fs cli)
			file(GLOB unit_sources CONFIGURE_DEPENDS tests/unit/${room}/*.c)
			if(NOT unit_sources)
				continue()
			endif()
			add_executable(unit_${room} ${unit_sources})
			set(unit_links repfs_os repfs_core)
			if(room STREQUAL "image")
				set(unit_links repfs_image ${unit_links})
			elseif(room STREQUAL "net")
				set(unit_links repfs_net ${unit_links})
			elseif(room STREQUAL "fs")
				set(unit_links ${repfs_rooms})
			elseif(room STREQUAL "cli")
				set(unit_links repfs_cli repfs_image repfs_net ${unit_links})
			endif()
			repfs_link(unit_${room} repfs_flags repfs_testlib ${unit_links} PkgConfig::CRITERION)
			add_test(NAME unit_${room} COMMAND unit_${room} --timeout 120)
			repfs_test_properties(unit_${room} unit 900)
		endforeach()
	elseif(NOT CRITERION_FOUND)
		message(STATUS "criterion not found: no unit tests (tests/deps.sh installs it)")
	endif()
endif()

file(GLOB stress_sources CONFIGURE_DEPENDS tests/stress/*.c)
repfs_programs(stress_programs ${stress_sources})
foreach(name IN LISTS stress_programs)
	add_test(NAME ${name} COMMAND ${name})
	repfs_test_properties(${name} stress 600)
endforeach()

file(GLOB bench_sources CONFIGURE_DEPENDS tests/bench/*.c)
repfs_programs(bench_programs ${bench_sources})

file(GLOB sim_sources CONFIGURE_DEPENDS tests/sim/*.c)
if(sim_sources)
	add_executable(sim ${sim_sources})
	repfs_link(sim repfs_flags repfs_testlib ${repfs_rooms} Threads::Threads)
	add_test(NAME sim COMMAND sim)
	repfs_test_properties(sim sim 900)
endif()

if(REPFS_FUZZ)
	file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/*.c)
	repfs_programs(fuzz_programs ${fuzz_sources})
	foreach(name IN LISTS fuzz_programs)
		target_link_options(${name} PRIVATE -fsanitize=fuzzer)
		# A short run from nothing: shows that the target works, not that the code is right.
		add_test(NAME ${name} COMMAND ${name} -max_total_time=10 -rss_limit_mb=2048 -print_final_stats=1)
		repfs_test_properties(${name} fuzz 120)
	endforeach()
endif()

# --- checks over the source text and the objects ---------------------------------------------------------------------

add_test(NAME check_includes COMMAND ${PROJECT_SOURCE_DIR}/tests/check_includes.sh)
add_test(NAME check_includes_selftest COMMAND ${PROJECT_SOURCE_DIR}/tests/check_includes.sh --self-test)
set_tests_properties(check_includes check_includes_selftest PROPERTIES LABELS lint TIMEOUT 120)

# Instrumented objects refer to the sanitizer's runtime, so only plain ones say what core itself asks for.
if(TARGET repfs_core AND NOT REPFS_SANITIZE AND NOT REPFS_FUZZ)
	add_test(NAME check_core_pure COMMAND ${PROJECT_SOURCE_DIR}/tests/check_core_pure.sh $<TARGET_FILE:repfs_core>)
	add_test(NAME check_core_pure_selftest COMMAND ${PROJECT_SOURCE_DIR}/tests/check_core_pure.sh --self-test
	                                               $<TARGET_FILE:repfs_core>)
	set_tests_properties(check_core_pure check_core_pure_selftest PROPERTIES LABELS lint TIMEOUT 60)
endif()

find_program(CLANG_FORMAT NAMES clang-format-14 clang-format)
if(CLANG_FORMAT)
	add_test(NAME format COMMAND ${PROJECT_SOURCE_DIR}/tests/check_format.sh ${CLANG_FORMAT})
	set_tests_properties(format PROPERTIES LABELS lint TIMEOUT 120)
endif()
