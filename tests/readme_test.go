package tests

import (
	"bytes"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	return string(text)
}

func TestReadmeShowsTheTopologyThatRuns(t *testing.T) {
	t.Parallel()
	printed, err := exec.Command(binary, "topology").Output()
	require.NoError(t, err)
	require.Contains(t, readme(t), "```\n"+string(printed)+"```", "README.md must show what takeout topology prints:\n%s", printed)
}

func TestReadmeListsEverySetting(t *testing.T) {
	t.Parallel()
	help, err := exec.Command(binary, "serve", "--help").Output()
	require.NoError(t, err)
	settings := regexp.MustCompile(`\$(TAKEOUT_[A-Z_]+)`).FindAllSubmatch(help, -1)
	require.NotEmpty(t, settings)
	text := readme(t)
	for _, s := range settings {
		require.Contains(t, text, "`"+string(s[1])+"`", "README.md must describe the setting")
	}
	for _, named := range regexp.MustCompile("`(TAKEOUT_[A-Z_]+)`").FindAllStringSubmatch(text, -1) {
		name := strings.TrimSuffix(named[1], "_FILE")
		if strings.HasPrefix(name, "TAKEOUT_TEST_") || name == "TAKEOUT_URL" {
			continue
		}
		require.True(t, bytes.Contains(help, []byte("$"+name)), "README.md describes %s, which is no setting", name)
	}
}
