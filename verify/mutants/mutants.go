// Package mutants holds defects that could have been made, to show that a verification run notices them. Nothing of them
// is in the program: a mutant is the program built with a few lines replaced.
package mutants

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Mutant is one defect.
type Mutant struct {
	Name    string
	What    string // is wrong with it, and which promise that breaks
	Changes []Change

	// The run of takeout verify in which it shows.
	Servers bool   // on MySQL and RabbitMQ, because it does not show on the embedded stack
	Orders  int    // to place
	Faults  int    // to make
	Kinds   string // of faults, separated by commas
	// What the run finds then: one of these at least, as "I1 lost".
	Expect []string
	Quick  bool // it shows within seconds, with nothing installed
}

// Change replaces a text in a file of the program.
type Change struct {
	File     string // from the root of the module, with slashes
	Old, New string // Old occurs once in File
}

// Named returns the mutants of those names, separated by commas, and all of them if there are none. The error names what
// is no mutant.
func Named(names string) ([]Mutant, error) {
	if names == "" {
		return All, nil
	}
	var some []Mutant
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(All, func(m Mutant) bool { return m.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no mutant %q", name)
		}
		some = append(some, All[i])
	}
	return some, nil
}

// packages returns the import paths of the packages that the mutant changes.
func (m Mutant) packages() []string {
	var paths []string
	for _, c := range m.Changes {
		dir, _, _ := strings.Cut(path.Dir(c.File), "/migrations") // which is embedded in the package above it
		paths = append(paths, "takeout/"+dir)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// overlay writes the changed files to dir, and returns the file there that makes the go command see them in the module at
// root, by its flag -overlay. The error says which change does not fit any more.
func (m Mutant) overlay(root, dir string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	texts := map[string]string{}
	for _, c := range m.Changes {
		file := filepath.Join(root, filepath.FromSlash(c.File))
		text, changed := texts[file]
		if !changed {
			bytes, err := os.ReadFile(file)
			if err != nil {
				return "", fmt.Errorf("mutant %s: %w", m.Name, err)
			}
			text = string(bytes)
		}
		if n := strings.Count(text, c.Old); n != 1 {
			return "", fmt.Errorf("mutant %s: %s has %d times instead of once: %s", m.Name, c.File, n, c.Old)
		}
		texts[file] = strings.Replace(text, c.Old, c.New, 1)
	}
	replace := map[string]string{}
	for file, text := range texts {
		changed := filepath.Join(dir, fmt.Sprintf("%d%s", len(replace), filepath.Ext(file)))
		if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[file] = changed
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	return file, os.WriteFile(file, text, 0o600)
}

// Build builds the mutant of the program whose module is at root as the executable out. The zero Mutant is the program
// itself. The error has what the compiler says.
func (m Mutant) Build(ctx context.Context, root, out string) error {
	out, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	return m.compile(ctx, root, "-o", out, "takeout")
}

// Check compiles the packages that the mutant changes, and nothing else, so that it is cheap.
func (m Mutant) Check(ctx context.Context, root string) error {
	return m.compile(ctx, root, m.packages()...)
}

func (m Mutant) compile(ctx context.Context, root string, args ...string) error {
	dir, err := os.MkdirTemp("", "takeout-mutant-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	overlay, err := m.overlay(root, dir)
	if err != nil {
		return err
	}
	// Without the revision: the report of a mutant must not look like one of the program.
	build := exec.CommandContext(ctx, "go", append([]string{"build", "-buildvcs=false", "-overlay", overlay}, args...)...)
	build.Dir = root
	if said, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("mutant %s does not compile: %w\n%s", m.Name, err, said)
	}
	return nil
}
